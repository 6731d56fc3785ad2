"""Solves plans in a process of its own, within a budget of wall time.

The runtime's solver port. A problem that comes while another is being solved waits, and only the newest
of those that wait is solved. If the process dies, plans are solved in place until it is back.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.solver.search import BUDGET, solve

log = logging.getLogger(__name__)

BUDGET_S = 0.25
"""Wall seconds that one plan may take."""
INLINE_BUDGET = 2_000
"""Groups followed for a plan that is solved in place: it holds up the service, a few milliseconds."""
LEAST_BUDGET = 500
RESTART_S = 1.0
"""After the death of the process."""
NICENESS = 5
"""A plan may come later: what serves goes first where they share a machine."""


class ProcessSolver:
    """Runtime's solver port for the live service. ``ready`` is called when a plan can be collected."""

    def __init__(self, ready: Callable[[], None], budget_s: float = BUDGET_S) -> None:
        self.ready_at = math.inf
        self.solve_s = 0.0
        """Seconds that the last plan took in the process."""
        self.solved = 0
        self._ready = ready
        self._budget_s = budget_s
        self._budget = BUDGET
        self._plan: Plan | None = None
        self._waiting: PlanProblem | None = None
        self._busy = False
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restarting: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the process. Without this, or after it died, plans are solved in place."""
        self._loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = ours
        self._loop.add_reader(ours.fileno(), self._readable)

    def stop(self) -> None:
        if self._restarting is not None:
            self._restarting.cancel()
            self._restarting = None
        connection, process = self._connection, self._process
        self._connection = self._process = None
        if connection is not None and self._loop is not None:
            self._loop.remove_reader(connection.fileno())
            connection.close()
        if process is not None:
            process.terminate()
            process.join(1.0)

    def submit(self, now: float, problem: PlanProblem) -> None:
        self._plan = None
        self.ready_at = math.inf
        if self._connection is None:
            self._solved(solve(problem, INLINE_BUDGET))
        elif self._busy:
            self._waiting = problem
        else:
            self._send(problem)

    def collect(self) -> Plan:
        plan = self._plan
        assert plan is not None, "collect() before a plan was ready"
        self._plan = None
        self.ready_at = math.inf
        return plan

    def _send(self, problem: PlanProblem) -> None:
        assert self._connection is not None
        self._busy = True
        try:
            self._connection.send((problem, self._budget))
        except OSError:
            self._died(problem)

    def _readable(self) -> None:
        assert self._connection is not None
        self._busy = False
        try:
            plan, seconds = self._connection.recv()
        except (EOFError, OSError):
            waiting, self._waiting = self._waiting, None
            self._died(waiting)
            return
        self.solve_s = seconds
        if plan.evaluations:
            fitting = int(plan.evaluations / max(seconds, 1e-4) * self._budget_s)
            self._budget = max(LEAST_BUDGET, min(BUDGET, (self._budget + fitting) // 2))
        if self._waiting is not None:
            problem, self._waiting = self._waiting, None
            self._send(problem)  # the plan that came answers a question that is out of date
        else:
            self._solved(plan)

    def _solved(self, plan: Plan) -> None:
        self.solved += 1
        self._plan = plan
        self.ready_at = 0.0  # at once
        self._ready()

    def _died(self, problem: PlanProblem | None) -> None:
        log.error("the solver's process ended; plans are solved in place until a new one is up")
        self.stop()
        if problem is not None:
            self._solved(solve(problem, INLINE_BUDGET))
        self._restart_later()

    def _restart_later(self) -> None:
        if self._loop is not None:
            self._restarting = self._loop.call_later(RESTART_S, self._restart)

    def _restart(self) -> None:
        self._busy = False
        try:
            self.start()
        except OSError as error:
            log.error("the solver's process cannot be started, trying again: %s", error)
            self._restart_later()


def _work(connection: Connection) -> None:
    """What the process does, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    with suppress(EOFError, ConnectionError):
        while True:
            problem, budget = connection.recv()
            start = time.perf_counter()
            plan = solve(problem, budget)
            connection.send((plan, time.perf_counter() - start))
