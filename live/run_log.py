"""A live run as the simulator's reports take one: its settles, from a moment on that counts as its start."""

from collections.abc import Sequence
from dataclasses import replace

from qlm_sim.core.actions import Action
from qlm_sim.core.events import EngineReported, Event, RequestArrived
from qlm_sim.core.manager import QueueManager
from qlm_sim.core.types import InstanceSpec
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.plan_log import PlanLog


class RunLog:
    """A listener of the service. Make it when the run starts, with all engines up."""

    def __init__(self, core: QueueManager, began_at: float) -> None:
        self.instances: tuple[InstanceSpec, ...] = tuple(
            replace(ledger.spec, resident=ledger.model) for ledger in core.ledgers.values()
        )
        """As they are at the start."""
        self.recorder = RunRecorder(self.instances)
        self._plans = PlanLog(self.recorder)
        self.plans = self._plans.plans
        self._began_at = began_at
        self._before = {name: ledger.reported for name, ledger in core.ledgers.items()}
        """What engines had done before the run."""

    def __call__(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        self._plans.record(now - self._began_at, [self._shifted(event) for event in events], actions)

    def _shifted(self, event: Event) -> Event:
        if isinstance(event, RequestArrived):
            request = event.request
            shifted = replace(request, arrived_at=request.arrived_at - self._began_at)
            return replace(event, request=shifted)
        if isinstance(event, EngineReported):
            before = self._before.get(event.instance)
            if before is not None and before.busy_s <= event.busy_s:
                return replace(
                    event,
                    busy_s=event.busy_s - before.busy_s,
                    preemptions=event.preemptions - before.preemptions,
                )
            self._before.pop(event.instance, None)  # it has started anew
        return event
