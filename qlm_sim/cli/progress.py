"""Talk on stderr: how far a run has come. Bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[str, int, int], None]
"""Told (what is under way, how much is done, how much there is)."""

_LINE_EVERY_S = 10.0


def say(line: str, quiet: bool) -> None:
    """One line of talk."""
    if not quiet:
        print(line, file=sys.stderr)


@contextmanager
def progress(quiet: bool) -> Iterator[Update]:
    """Shows what it is told until the block ends."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bars() as update:
            yield update
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _lines() -> Update:
    """A line for what takes long, at most every few seconds."""
    spoken = time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken >= _LINE_EVERY_S:
            spoken = now
            share = f"{100 * done / total:.0f}%" if total else f"{done:,}"
            print(f"{what}: {share}", file=sys.stderr)

    return update
