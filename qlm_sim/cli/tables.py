"""Tables as this command line prints them: plain, narrow, the first column to the left."""

from rich.box import SIMPLE_HEAD
from rich.table import Table


def plain_table(first: str, *rest: str, title: str | None = None) -> Table:
    """An empty table: names in the first column, figures to the right in the others."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="",
    )
    table.add_column(first, overflow="fold")
    for column in rest:
        table.add_column(column, justify="right", overflow="fold")
    return table
