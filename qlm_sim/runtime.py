"""The loop around the core, the same in simulation and live: gather, sort, settle, log.

Events of one instant are gathered in an inbox, put in one total order, applied together and decided
upon once. The world (SimPy or asyncio) says when an instant is over by calling ``settle``.
"""

from collections.abc import Sequence
from typing import Protocol

from qlm_sim.core.actions import Action, Evict, Pull, Reject, Replan, SwapModel
from qlm_sim.core.events import (
    EngineReported,
    Event,
    FirstToken,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    PlanReady,
    Progress,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
    TimerFired,
)
from qlm_sim.core.plan import Plan, PlanProblem


class Core(Protocol):
    """The scheduler: facts in, orders out."""

    @property
    def wake_at(self) -> float:
        """When the core wants a TimerFired, in seconds; infinity for never."""
        ...

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]: ...


class Engines(Protocol):
    """The engines' side of the port: carries out orders and posts what came of them."""

    def execute(self, action: Pull | Evict | SwapModel | Reject) -> None: ...


class Solver(Protocol):
    """Solves plans off the serving path. A new problem replaces one that is not solved yet."""

    ready_at: float
    """When the answer may be collected, in seconds; infinity while nothing is under way."""

    def submit(self, now: float, problem: PlanProblem) -> None: ...

    def collect(self) -> Plan: ...


class Recorder(Protocol):
    """Keeps the event log, or what a reader of it needs."""

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None: ...


_RANK: dict[type, int] = {
    kind: rank
    for rank, kind in enumerate(
        (
            InstanceUp,
            InstanceDown,
            ModelSwapped,
            RequestFinished,
            RequestFailed,
            RequestEvicted,
            FirstToken,
            Progress,
            EngineReported,
            RequestCancelled,
            RequestArrived,
            PlanReady,
            TimerFired,
        )
    )
}


def settle_order(event: Event) -> tuple[int, str, str]:
    """Sort key that puts the events of one instant in the same order in every world."""
    rank = _RANK[type(event)]
    # The commonest first, and asked in the way that takes least time.
    if type(event) is FirstToken or type(event) is RequestFinished:
        return rank, event.instance, event.request_id
    if type(event) is RequestArrived:
        return rank, "", event.request.id
    if type(event) is EngineReported:
        return rank, event.instance, ""
    if type(event) is InstanceUp:
        return rank, event.spec.id, ""
    return rank, getattr(event, "instance", ""), getattr(event, "request_id", "")


class Runtime:
    """Carries events to the core and its orders to the engines and the solver."""

    def __init__(self, core: Core, engines: Engines, solver: Solver, recorder: Recorder) -> None:
        self.core = core
        self.engines = engines
        self.solver = solver
        self.recorder = recorder
        self.inbox: list[Event] = []
        self.post = self.inbox.append

    @property
    def wake_at(self) -> float:
        """When ``settle`` wants to be called though nothing happens, in seconds."""
        wake_at, ready_at = self.core.wake_at, self.solver.ready_at
        return wake_at if wake_at < ready_at else ready_at

    def settle(self, now: float) -> float:
        """Decide upon all that was posted in this instant, and send out the orders.

        Returns ``wake_at``.
        """
        inbox, solver, core = self.inbox, self.solver, self.core
        events = inbox.copy()
        inbox.clear()
        ready_at = solver.ready_at
        if ready_at <= now:
            events.append(PlanReady(solver.collect()))
            ready_at = solver.ready_at
        if len(events) > 1:
            events.sort(key=settle_order)
        actions = core.handle(now, events)
        self.recorder.record(now, events, actions)
        for action in actions:
            if type(action) is Replan:
                solver.submit(now, action.problem)
                ready_at = solver.ready_at
            else:
                self.engines.execute(action)  # type: ignore[arg-type]
        wake_at = core.wake_at
        return wake_at if wake_at < ready_at else ready_at
