"""The comparison table on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.comparison import (
    Column,
    attainment_columns,
    footnotes,
    headline,
    service_columns,
    warnings,
)


def print_comparison(runs: Sequence[PolicyRun], console: Console) -> None:
    """Print the policies as rows, the best figures bold: one table, or as many as the width asks for."""
    attainment = attainment_columns(runs)
    service = service_columns(runs)
    if _fits(runs, [*attainment, *service], console):
        console.print(_table(runs, [*attainment, *service]))
    else:
        for columns in (*_parts(runs, attainment, console), *_parts(runs, service, console)):
            console.print(_table(runs, columns))
    for note in footnotes(runs):
        console.print(Text(note))
    console.print(Text(headline(runs)))
    for warning in warnings(runs):
        console.print(Text(warning, style="yellow"))


def _parts(runs: Sequence[PolicyRun], columns: Sequence[Column], console: Console) -> list[list[Column]]:
    """The columns in their order, as many together as fit."""
    parts: list[list[Column]] = [[]]
    for column in columns:
        if parts[-1] and not _fits(runs, [*parts[-1], column], console):
            parts.append([])
        parts[-1].append(column)
    return parts


def _fits(runs: Sequence[PolicyRun], columns: Sequence[Column], console: Console) -> bool:
    unbounded = console.options.update(width=10_000)
    return console.measure(_table(runs, columns), options=unbounded).maximum <= console.width


def _table(runs: Sequence[PolicyRun], columns: Sequence[Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="")
    table.add_column("policy", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    cells = [column.rows(runs) for column in columns]
    for row, run in enumerate(runs):
        figures = [Text(text, style="bold" if best else "") for text, best in (cell[row] for cell in cells)]
        table.add_row(Text(run.label), *figures)
    return table
