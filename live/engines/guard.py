"""Guards: processes that end others when we are gone, however we went.

What outlives us would hold the GPU's memory against the next. A guard acts when the pipe closes that we hold.
"""

import os
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress

Guard = subprocess.Popen[bytes]


def lead_group() -> Guard:
    """A guard that leads a process group, and ends all that join it."""
    return _guard("kill -KILL 0")


def watch_over(pids: Iterable[int]) -> Guard:
    """A guard of processes that are there already."""
    return _guard('kill -KILL "$@"', *map(str, pids))


def dismiss(guard: Guard) -> None:
    """End the guard, and its group if it leads one. Guarded processes of no such group live on."""
    with suppress(ProcessLookupError):
        os.killpg(guard.pid, signal.SIGKILL)
    guard.communicate()


def _guard(then: str, *arguments: str) -> Guard:
    command = ("sh", "-c", f"read _; {then}", "guard", *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
