"""A run as reports take one: its settles from a moment on that counts as its start, live or simulated."""

from collections.abc import Sequence
from dataclasses import replace

from msgspec import structs

from qlm_sim.core.actions import Action
from qlm_sim.core.events import EngineReported, Event, RequestArrived
from qlm_sim.core.manager import QueueManager
from qlm_sim.core.plan import PlanExplanation
from qlm_sim.core.types import InstanceSpec
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.plan_log import PlanLog


def as_they_are(core: QueueManager) -> tuple[InstanceSpec, ...]:
    """The instances with the models that are loaded now."""
    return tuple(replace(ledger.spec, resident=ledger.model) for ledger in core.ledgers.values())


class RunLog:
    """Records a service's or a simulation's run. What arrived before ``begins_at`` is no part of the run."""

    def __init__(self, core: QueueManager, begins_at: float) -> None:
        self.recorder = RunRecorder()
        self.plans: list[PlanExplanation] = []
        self.slowness: dict[str, float] = {}
        """By instance: its seconds per second of its profile, as the scheduler knew when the run began."""
        self._core = core
        self._begins_at = begins_at
        self._log: PlanLog | None = None
        self._ours: set[str | None] = {None}
        """Requests that arrived since; None stands for what concerns no request."""

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        if now < self._begins_at:
            return
        if self._log is None:
            self.recorder = RunRecorder(as_they_are(self._core))
            self._log = PlanLog(self.recorder)
            self.plans = self._log.plans
            self.slowness = {
                name: self._core.estimator.slowness(ledger, ledger.model)
                for name, ledger in self._core.ledgers.items()
                if ledger.model is not None
            }
            self._before = {name: ledger.reported for name, ledger in self._core.ledgers.items()}
            """What engines had done before the run."""
        self._log.record(
            now - self._begins_at,
            [self._shifted(event) for event in events if self._concerns_us(event)],
            [action for action in actions if getattr(action, "request_id", None) in self._ours],
        )

    def _concerns_us(self, event: Event) -> bool:
        if isinstance(event, RequestArrived) and event.request.arrived_at >= self._begins_at:
            self._ours.add(event.request.id)
        request = (
            event.request.id if isinstance(event, RequestArrived) else getattr(event, "request_id", None)
        )
        return request in self._ours

    def _shifted(self, event: Event) -> Event:
        if isinstance(event, RequestArrived):
            request = event.request
            shifted = structs.replace(request, arrived_at=request.arrived_at - self._begins_at)
            return structs.replace(event, request=shifted)
        if isinstance(event, EngineReported):
            before = self._before.get(event.instance)
            if before is not None and before.busy_s <= event.busy_s:
                return structs.replace(
                    event,
                    busy_s=event.busy_s - before.busy_s,
                    preemptions=event.preemptions - before.preemptions,
                )
            self._before.pop(event.instance, None)  # it has started anew
        return event
