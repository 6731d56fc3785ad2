"""The paper's scheduler as an integer program: which group is served by which instance in which turn.

Follows Patke et al. (SoCC '24, section 6): x[g, i, j] is 1 if group g is j-th on instance i, a slot that
needs another model than the one before pays a swap, and a slot waits for all services and swaps before it.
The paper demands that no SLO is missed; here lateness is soft, since under overload nothing else is
feasible, and the objective is that of ``cost`` as far as a linear program can say it:

* A group's share of late requests is an S-curve of when its middle request is served. The program has
  two rising segments and then, by a binary variable, the plateau of the wholly missed.
* The curve's width is that of a group served when it is due, not when it is served, which is unknown.
* Lateness, waiting and swaps cost what they do there; a swap moves an average batch away.

So an optimum of the program is not quite one of ``cost`` (for that, see solver.optimum), and its plans are
priced by the latter alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from qlm_sim.core.plan import InstanceState, Plan, PlanProblem, WaitingGroup
from qlm_sim.solver.cost import (
    DECISION_S,
    DRIFT,
    LATENESS_PER_S,
    MISS,
    SWAP_PER_S,
    WAIT_PER_S2,
    plan_cost,
)
from qlm_sim.solver.mip import Backend, Outcome, run

if TYPE_CHECKING:
    import pulp

NODES = 2_000
GAP = 1e-3
"""Both relative and in missed requests: what counts as proved."""
_KNEES = ((-2.0, 0.0), (-0.5, 0.31), (1.2, 1.0))
"""The S-curve: (lateness of the middle request in standard deviations, share of the group that is late)."""


EVALUATIONS = {Backend.HIGHS: 3, Backend.CBC: 10}
"""What a program costs, by the cube of its places, in groups followed through queues: of these as many as
took the same time, for 27 to 108 places."""


@dataclass(frozen=True, slots=True)
class MilpAnswer:
    """What became of one program."""

    outcome: Outcome
    objective: float
    """Its own value of the plan, which is not the plan's cost."""
    plan: Plan | None
    """None if no solution was found."""


def places(problem: PlanProblem) -> int:
    """The size of the program: how many groups could stand in how many slots of how many instances."""
    return sum(
        sum(instance.kind in group.service for group in problem.groups) ** 2 for instance in problem.instances
    )


def solve_milp(problem: PlanProblem, backend: Backend = Backend.HIGHS, nodes: int = NODES) -> MilpAnswer:
    """The program's plan. Meant for some dozens of ``places``: 72 take HiGHS two seconds."""
    program = _Program(problem)
    outcome = run(program.problem, backend, nodes=nodes, gap=GAP)
    if outcome is Outcome.NONE:
        return MilpAnswer(outcome, float("inf"), None)
    queues = program.queues()
    work = EVALUATIONS[backend] * places(problem) ** 3
    plan = Plan(problem.number, queues, plan_cost(problem, queues), evaluations=work)
    return MilpAnswer(outcome, float(program.problem.objective.value()), plan)


class _Program:
    """Variables and constraints; ``queues`` reads the solution."""

    def __init__(self, problem: PlanProblem) -> None:
        import pulp  # here, because it takes long to import and most runs do without

        self._plan_problem = problem
        self.problem = pulp.LpProblem("plan", pulp.LpMinimize)
        self._cost: list[pulp.LpAffineExpression] = []
        self._x: dict[tuple[int, int, int], pulp.LpVariable] = {}
        """By group, instance and slot."""
        for index, instance in enumerate(problem.instances):
            self._add_instance(index, instance)
        for group in problem.groups:
            self.problem += pulp.lpSum(x for (g, _, _), x in self._x.items() if g == group.id) == 1
        self.problem += pulp.lpSum(self._cost)

    def _variable(self, name: str, most: float | None = None, binary: bool = False) -> "pulp.LpVariable":
        return self.problem.add_variable(name, 0, most, cat="Binary" if binary else "Continuous")

    def _add_instance(self, i: int, instance: InstanceState) -> None:
        """The slots of one instance, each with when it begins and what it serves."""
        import pulp

        able = [group for group in self._plan_problem.groups if instance.kind in group.service]
        if not able:
            return
        models = sorted({group.model for group in able})
        change_s = {model: instance.leave_s + instance.swap_s[model] for model in models}
        longest_s = instance.ready_s + sum(_took_s(group, instance) + change_s[group.model] for group in able)
        moved = sum(min(g.service[instance.kind].batch, g.requests) for g in able) / len(able)
        clock: pulp.LpAffineExpression = pulp.LpAffineExpression(instance.ready_s)
        free: pulp.LpAffineExpression = pulp.LpAffineExpression(instance.free)
        loaded: Mapping[str, pulp.LpAffineExpression | int] = {m: int(m == instance.model) for m in models}
        used: pulp.LpAffineExpression | int = 1
        for j in range(len(able)):
            x = {g.id: self._variable(f"x_{g.id}_{i}_{j}", 1, binary=True) for g in able}
            self._x.update({(g, i, j): variable for g, variable in x.items()})
            filled = pulp.lpSum(x.values())
            self.problem += filled <= used  # no gap between groups, and one of them at most
            serves = {m: pulp.lpSum(x[g.id] for g in able if g.model == m) for m in models}
            swap = {m: self._variable(f"swap_{i}_{j}_{m}", 1) for m in models}
            for model in models:
                # Exactly 1 where the model is served and was not loaded: room must not be had by a mere flag.
                self.problem += swap[model] >= serves[model] - loaded[model]
                self.problem += swap[model] <= serves[model]
                self.problem += swap[model] <= 1 - loaded[model]
            clock = clock + pulp.lpSum(change_s[m] * swap[m] for m in models)
            running = max(1.0, instance.running if j == 0 else moved)
            self._cost += [SWAP_PER_S * running * change_s[m] * swap[m] for m in models]
            # Room: shares of a batch. What does not find any waits for departures.
            room = self._variable(f"room_{i}_{j}", 1)
            self.problem += room <= free + pulp.lpSum(swap.values())
            behind = {}
            need = pulp.LpAffineExpression()
            took: list[pulp.LpAffineExpression] = []
            for group in able:
                service = group.service[instance.kind]
                share = group.requests / service.batch
                behind[group.id] = self._variable(f"behind_{group.id}_{i}_{j}", share)
                self.problem += behind[group.id] <= share * x[group.id]
                need += share * x[group.id]
                took.append(group.requests * service.prefill_s * x[group.id])
                took.append(service.batch * service.decode_s * behind[group.id])
            free = room - need + pulp.lpSum(behind.values())
            self.problem += free >= 0
            served = pulp.lpSum(took)
            self._add_lateness(f"{i}_{j}", instance, able, x, clock + 0.5 * served, filled, longest_s)
            clock = clock + served
            loaded, used = serves, filled

    def _add_lateness(
        self,
        name: str,
        instance: InstanceState,
        able: list[WaitingGroup],
        x: Mapping[int, "pulp.LpVariable"],
        middle: "pulp.LpAffineExpression",
        filled: "pulp.LpAffineExpression",
        longest_s: float,
    ) -> None:
        """What it costs that the middle request of the slot's group has its first token at ``middle``.

        One time for each group, all but that of the group which the slot serves being 0.
        """
        from pulp import lpSum

        times = []
        for group in able:
            g = x[group.id]
            weight = group.weight * group.requests
            due_s = (group.first_deadline_s + group.last_deadline_s) / 2
            at = self._variable(f"at_{group.id}_{name}", longest_s)
            times.append(at)
            self.problem += at <= longest_s * g
            service = group.service[instance.kind]
            work_s = group.requests * (service.prefill_s + service.decode_s)
            self._cost.append(2 * work_s * WAIT_PER_S2 * at)
            if due_s < longest_s:
                late = self._variable(f"late_{group.id}_{name}")
                self.problem += at <= due_s * g + late
                self._cost.append(weight * LATENESS_PER_S * late)
            (low, _), (knee, share), (high, _) = _KNEES
            sd_s = _sd_s(group, instance, due_s)
            if group.decided or due_s + low * sd_s >= longest_s:
                continue
            lower = self._variable(f"lower_{group.id}_{name}", 1)
            upper = self._variable(f"upper_{group.id}_{name}", 1)
            lost = self._variable(f"lost_{group.id}_{name}", 1, binary=True)
            self.problem += lower <= g
            self.problem += upper <= lower
            self.problem += lost <= upper
            rises = (knee - low) * sd_s * lower + (high - knee) * sd_s * upper
            beyond_s = max(0.0, longest_s - due_s - high * sd_s)
            self.problem += at <= (due_s + low * sd_s) * g + rises + beyond_s * lost
            self._cost += [weight * MISS * share * lower, weight * MISS * (1 - share) * upper]
        self.problem += middle <= lpSum(times) + longest_s * (1 - filled)

    def queues(self) -> dict[str, tuple[int, ...]]:
        instances = self._plan_problem.instances
        served = sorted((i, j, g) for (g, i, j), x in self._x.items() if x.value() > 0.5)
        return {
            instance.id: tuple(g for index, _, g in served if index == i)
            for i, instance in enumerate(instances)
        }


def _took_s(group: WaitingGroup, instance: InstanceState) -> float:
    """Seconds of service when nothing finds room at once."""
    service = group.service[instance.kind]
    return group.requests * (service.prefill_s + service.decode_s)


def _sd_s(group: WaitingGroup, instance: InstanceState, due_s: float) -> float:
    """Standard deviation of a request's lateness, when the group's middle request is served as it is due.

    Half of the wait until then is taken to be departures of a full batch, the rest prefill, swaps and room at
    once. The group's own requests are spread around its middle, about evenly.
    """
    service = group.service[instance.kind]
    wait_s = max(0.0, due_s)
    departures = wait_s / service.decode_s / 2 if service.decode_s > 0 else 0.0
    wait_sd_s = sqrt(departures) * service.decode_sd_s + DECISION_S + DRIFT * wait_s
    lasts_s = group.requests * service.prefill_s + max(0.0, group.requests - service.batch) * service.decode_s
    spread_s = lasts_s - (group.last_deadline_s - group.first_deadline_s)
    return sqrt(wait_sd_s**2 + spread_s**2 / 12)
