"""Runs independent jobs in processes of their own, a few at a time, and hears how far each has come.

Knows nothing of what the jobs do. Results come back in the order of the jobs, whichever ends first.
"""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from qlm_sim.errors import InputError

Report = Callable[[Any], None]
Job = Callable[[Report], Any]
"""Does its work, reporting on the way, and returns its result. It and its result must be picklable."""


def run_jobs(jobs: Sequence[Job], at_once: int, report: Callable[[int, Any], None]) -> list[Any]:
    """The jobs' results. ``report`` is told (number of the job, what the job reported).

    A job's InputError is raised here. A job that dies in any other way has told its story on stderr;
    then, and when this is interrupted, the other jobs are ended as well.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # or its start would undo the mask below
    results: dict[int, Any] = {}
    running: dict[Connection, tuple[int, SpawnProcess]] = {}
    waiting = list(enumerate(jobs))[::-1]
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, job = waiting.pop()
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
                process.start()  # inherits the mask: Ctrl-C is for us, who end it
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
                theirs.close()
                running[ours] = number, process
                ours.send(job)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                number, process = running[connection]
                try:
                    kind, value = connection.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(f"job {number} ended with exit code {process.exitcode}") from None
                if kind == "report":
                    report(number, value)
                    continue
                if kind == "error":
                    raise InputError(value)
                results[number] = value
                del running[connection]
                process.join()
    finally:
        for _, process in running.values():
            process.terminate()
    return [results[number] for number in range(len(jobs))]


def _work(connection: Connection) -> None:
    """What a process does. It ends quietly when nobody listens any more."""
    with suppress(EOFError, ConnectionError):
        job = connection.recv()
        try:
            connection.send(("result", job(lambda value: connection.send(("report", value)))))
        except InputError as error:
            connection.send(("error", str(error)))
