"""The plans of a run, explained as they pass by in the event log."""

from collections.abc import Sequence

from qlm_sim.core.actions import Action, Replan
from qlm_sim.core.events import Event, PlanReady
from qlm_sim.core.plan import PlanExplanation, PlanProblem
from qlm_sim.runtime import Recorder
from qlm_sim.solver.explain import explain


class PlanLog:
    """A recorder that passes everything on and keeps an explanation of each plan that moved a group."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._problem: PlanProblem | None = None
        self.plans: list[PlanExplanation] = []

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        self._recorder.record(now, events, actions)
        for event in events:
            if type(event) is PlanReady and self._problem is not None:
                if event.plan.queues == self._problem.current:
                    continue
                explained = explain(now, self._problem, event.plan)
                if explained.moves:
                    self.plans.append(explained)
        for action in actions:
            if type(action) is Replan:
                self._problem = action.problem
