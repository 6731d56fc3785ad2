"""The comparison table on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.comparison import Column, attainment_columns, headline, service_columns, warnings


def print_comparison(runs: Sequence[PolicyRun], console: Console) -> None:
    """Print the policies as rows, the best figures bold: one table, or two where one is too wide."""
    attainment = attainment_columns([slo.name for slo in runs[0].slo_classes])
    service = service_columns(runs)
    whole = _table(runs, [*attainment, *service])
    unbounded = console.options.update(width=10_000)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(runs, attainment))
        console.print(_table(runs, service))
    console.print(Text(headline(runs)))
    for warning in warnings(runs):
        console.print(Text(warning, style="yellow"))


def _table(runs: Sequence[PolicyRun], columns: Sequence[Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="")
    table.add_column("policy", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    cells = [column.rows(runs) for column in columns]
    for row, run in enumerate(runs):
        figures = [Text(text, style="bold" if best else "") for text, best in (cell[row] for cell in cells)]
        table.add_row(Text(run.name), *figures)
    return table
