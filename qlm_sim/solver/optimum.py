"""The proved optimum of ``cost`` for problems of a dozen groups: which set of groups each instance serves, as
an integer program over sets that are priced exactly.

The program chooses one set for each instance so that every group is in one of them: a set partitioning. A
set's price is the least that ``cost`` makes of any order of it on that instance, so the program's optimum is
that of ``cost`` itself, with nothing linearised. Prices come from label setting: orders are built group by
group, and one is dropped where another of the same groups can only do better from there, or where what is
left costs too much for a plan better than one that is known. Why that loses no optimum stands at ``_Orders``
and ``_least_prices``.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from qlm_sim.core.plan import InstanceState, Plan, PlanProblem
from qlm_sim.solver.cost import SWAP_PER_S, State, Task, beginning, follow, plan_cost, task
from qlm_sim.solver.mip import Backend, Outcome, run
from qlm_sim.solver.queues import CLOCK_S, COST, RUNNING, RUNNING_S, UNDONE_S, WAITING
from qlm_sim.solver.search import solve

TOLERANCE = 1e-7
"""In missed requests: what counts as equal, in the proof as a whole."""
ROUNDING = 1e-9
"""The same between two orders: times, rooms and costs are sums of floats."""
NODES = 100_000


def solve_to_optimality(problem: PlanProblem) -> Plan:
    """The plan of least cost, proved so to ``TOLERANCE``. Raises RuntimeError if the nodes do not suffice.

    Time grows exponentially with the number of groups, though far less than the factorial: meant for a dozen.
    """
    import pulp  # here, because it takes long to import and most runs do without

    known = solve(problem)
    least = _least_prices(problem)
    program = pulp.LpProblem("optimum", pulp.LpMinimize)
    chosen: dict[tuple[str, int], pulp.LpVariable] = {}
    order: dict[tuple[str, int], tuple[int, ...]] = {}
    prices = []
    work = known.evaluations
    for i, instance in enumerate(problem.instances):
        orders = _Orders(problem, instance, least, known.cost + TOLERANCE)
        work += orders.work
        for groups, (price, ids) in orders.best.items():
            x = chosen[instance.id, groups] = program.add_variable(f"x_{i}_{groups}", 0, 1, pulp.LpBinary)
            order[instance.id, groups] = ids
            prices.append(price * x)
        program += pulp.lpSum(chosen[instance.id, groups] for groups in orders.best) == 1
    for bit in range(len(problem.groups)):
        program += pulp.lpSum(x for (_, groups), x in chosen.items() if groups >> bit & 1) == 1
    program.setObjective(pulp.lpSum(prices))
    if run(program, Backend.HIGHS, nodes=NODES, gap=TOLERANCE) is not Outcome.OPTIMAL:
        raise RuntimeError(
            f"problem {problem.number}: {len(chosen)} sets of {len(problem.groups)} groups, no proof within "
            f"{NODES} nodes"
        )
    queues = {key[0]: order[key] for key, x in chosen.items() if x.value() > 0.5}
    return Plan(problem.number, queues, plan_cost(problem, queues), work)


def _least_prices(problem: PlanProblem) -> list[float]:
    """By group: no plan pays less for it.

    However late it is served, it starts no sooner than an instance is ready, after a swap if its model is not
    loaded, and finds an empty batch at best. Its chance to be late is then no less than that of such a start,
    or it is late by mean, and the chance is at least half, however uncertain the time. So half of what such a
    start costs for misses and lateness is a bound, and all of what it costs for waiting.
    """
    least = [inf] * len(problem.groups)
    for instance in problem.instances:
        for index, group in enumerate(problem.groups):
            if instance.kind in group.service:
                each = task(group, instance.kind)
                start_s = instance.ready_s
                if each.model != instance.model:
                    start_s += instance.leave_s + instance.swap_s[each.model]
                at_best: State = (start_s, 0.0, each.model, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
                trail: list[State] = []
                cost = follow(at_best, (each,), instance.leave_s, instance.swap_s, trail=trail)
                waited = trail[0][WAITING]
                least[index] = min(least[index], waited + 0.5 * (cost - waited))
    return least


class _Label(NamedTuple):
    """An order of some groups."""

    groups: int
    """Which, as bits."""
    state: State
    """The instance after them."""
    rest: float
    """A bound on what the others cost, wherever they are served."""
    ids: tuple[int, ...]


class _Orders:
    """The best order of every set of groups on one instance, as far as a plan below ``limit`` may have it.

    Two orders of one set that end with the same model, room and variance go on alike but for the clock: with
    the later one every further group is served later, and what it costs rises with that time. So the order
    with the earlier clock, less work cut short and the lower cost stands for both. (Room and variance must be
    the same: with less variance, what is late by mean is so for sure. And costs rise with time only for what
    is not overdue by more than DECISION_S / DRIFT, which nothing is that can still be met.) The cost of
    running requests that the next swap may have to move is added where they differ, and so is the work that
    it cuts short.
    """

    def __init__(
        self, problem: PlanProblem, instance: InstanceState, least: Sequence[float], limit: float
    ) -> None:
        self.best: dict[int, tuple[float, tuple[int, ...]]] = {}
        """By set, as bits: its cost and its order."""
        self.work = 0
        tasks = [
            (1 << index, task(group, instance.kind), least[index])
            for index, group in enumerate(problem.groups)
            if instance.kind in group.service
        ]
        dearest_s = max((instance.swap_s[each.model] for _, each, _ in tasks), default=0.0)
        self._per_running = SWAP_PER_S * (instance.leave_s + dearest_s)
        labels = [_Label(0, beginning(instance), sum(least), ())]
        while labels:
            for label in labels:
                cost = label.state[COST]
                if label.groups not in self.best or cost < self.best[label.groups][0]:
                    self.best[label.groups] = cost, label.ids
            labels = self._longer(labels, tasks, instance.leave_s, instance.swap_s, limit)

    def _longer(
        self,
        labels: Sequence[_Label],
        tasks: Sequence[tuple[int, Task, float]],
        leave_s: float,
        swap_s: Mapping[str, float],
        limit: float,
    ) -> list[_Label]:
        """The orders of one group more that are worth keeping."""
        alike: dict[tuple[int, str | None, float, float], list[_Label]] = {}
        for groups, state, rest, ids in labels:
            for bit, each, price in tasks:
                if groups & bit:
                    continue
                trail: list[State] = []
                self.work += 1
                if follow(state, (each,), leave_s, swap_s, limit - rest + price, trail) < inf:
                    label = _Label(groups | bit, trail[0], rest - price, (*ids, each.id))
                    _, variance, model, room, *_ = label.state
                    kept = alike.setdefault((label.groups, model, round(variance, 9), round(room, 9)), [])
                    if not any(self._stands_for(other, label) for other in kept):
                        kept[:] = [other for other in kept if not self._stands_for(label, other)]
                        kept.append(label)
        return [label for kept in alike.values() for label in kept]

    def _stands_for(self, one: _Label, other: _Label) -> bool:
        a, b = one.state, other.state
        moved = self._per_running * max(0.0, a[RUNNING] - b[RUNNING])
        undone_s = a[UNDONE_S] + max(0.0, a[RUNNING_S] - b[RUNNING_S]) - b[UNDONE_S]
        return (
            a[CLOCK_S] <= b[CLOCK_S] + ROUNDING
            and a[CLOCK_S] + undone_s <= b[CLOCK_S] + ROUNDING
            and a[COST] + moved <= b[COST] + ROUNDING
        )
