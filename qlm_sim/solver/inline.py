"""Solves plans in place, for simulations: the latency is modelled, not measured.

A wall-clock limit would make a simulation depend on the machine. So the solver gets a budget of
work, and its answer is ready after the time that such work takes on one core.
"""

from collections.abc import Callable

from qlm_sim.core.plan import Plan, PlanProblem

FIXED_S = 0.002
"""Modelled seconds to take a snapshot, send it to the solver's process and get the plan back."""
EVALUATION_S = 1.5e-6
"""Modelled seconds per group that is followed through a queue, as measured on one core."""


class InlineSolver:
    """Runtime's solver port for simulations."""

    def __init__(self, solve: Callable[[PlanProblem], Plan]) -> None:
        self._solve = solve
        self._plan: Plan | None = None
        self.ready_at = float("inf")

    def submit(self, now: float, problem: PlanProblem) -> None:
        self._plan = self._solve(problem)
        self.ready_at = now + FIXED_S + EVALUATION_S * self._plan.evaluations

    def collect(self) -> Plan:
        plan = self._plan
        assert plan is not None, "collect() without a submitted problem"
        self._plan = None
        self.ready_at = float("inf")
        return plan
