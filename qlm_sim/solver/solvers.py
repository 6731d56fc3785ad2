"""The solvers that a scenario can choose: the search, or the paper's integer program where that can go."""

from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.solver.cost import plan_cost
from qlm_sim.solver.mip import Backend
from qlm_sim.solver.search import solve
from qlm_sim.solver.starts import edf_queues

DEFAULT_SOLVER = "search"
_BACKENDS = {"milp": Backend.HIGHS, "milp-cbc": Backend.CBC}
SOLVERS = (DEFAULT_SOLVER, *_BACKENDS)
MOST_PLACES = 75
"""Largest integer program that is tried, in instances × groups²: two instances with six groups."""


class PlanSolver:
    """Solves with the solver of that name, and with the search what is too large for it."""

    def __init__(self, name: str) -> None:
        self._backend = _BACKENDS.get(name)
        self.plans = 0
        """Problems solved ..."""
        self.fallbacks = 0
        """... and those of them that were too large."""

    def __call__(self, problem: PlanProblem) -> Plan:
        self.plans += 1
        if self._backend is None:
            return solve(problem)
        from qlm_sim.solver.milp import places  # here, because most runs do without

        if places(problem) > MOST_PLACES:
            self.fallbacks += 1
            return solve(problem)
        return milp_plan(problem, self._backend)


def milp_plan(problem: PlanProblem, backend: Backend) -> Plan:
    """The program's plan; or the plan in force, or that of earliest deadline first, if ``cost`` is less so.

    The program's own objective is not quite ``cost``, and it may have run out of nodes.
    """
    from qlm_sim.solver.milp import solve_milp

    answer = solve_milp(problem, backend)
    rule = edf_queues(problem)
    plans = [Plan(problem.number, rule, plan_cost(problem, rule), len(problem.groups))]
    if sum(len(queue) for queue in problem.current.values()) == len(problem.groups):
        kept = plan_cost(problem, problem.current)
        plans.append(Plan(problem.number, problem.current, kept, len(problem.groups)))
    work = sum(plan.evaluations for plan in plans)
    if answer.plan is not None:
        plans.append(answer.plan)
        work += answer.plan.evaluations
    best = min(reversed(plans), key=lambda plan: plan.cost)
    return Plan(problem.number, best.queues, best.cost, work)
