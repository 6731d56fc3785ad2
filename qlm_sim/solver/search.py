"""The global scheduler's own solver: greedy insertion, then local search, as far as a budget goes.

Anytime and deterministic: the budget counts priced queues, never seconds, so a simulation does not
depend on the machine. It starts from the plan in force and moves only what lowers the cost, so that
plans do not flap. Groups of one model stand in deadline order inside each visit to that model.
"""

from collections.abc import Callable, Mapping, Sequence

from qlm_sim.core.plan import InstanceState, Plan, PlanProblem, WaitingGroup
from qlm_sim.solver.cost import queue_cost

BUDGET = 2000
"""Priced queues per plan."""

GOOD_ENOUGH = 0.5
"""A plan that costs less than half a missed request is not sought to be bettered from scratch."""
SHORT_QUEUE = 6
"""Up to this many groups, every position of a queue is tried."""

_GAIN = 1e-9


class Search:
    """One run of the solver on one problem."""

    def __init__(self, problem: PlanProblem, budget: int) -> None:
        self._problem = problem
        self._left = budget
        self._budget = budget
        self._instances = {instance.id: instance for instance in problem.instances}
        self._queues: dict[str, list[WaitingGroup]] = {}
        self._costs: dict[str, float] = {}

    def solve(self) -> Plan:
        """The best plan found: from the plan in force, and from scratch in orders that often win."""
        self._start(self._problem.current)
        self._improve()
        for order in (_by_deadline, _by_length, _by_model):
            if self._left <= 0 or sum(self._costs.values()) < GOOD_ENOUGH:
                break
            queues, costs = self._queues, self._costs
            self._start({}, order)
            self._improve()
            if sum(self._costs.values()) >= sum(costs.values()) - _GAIN:
                self._queues, self._costs = queues, costs
        return Plan(
            number=self._problem.number,
            queues={name: tuple(group.id for group in queue) for name, queue in self._queues.items()},
            cost=sum(self._costs.values()),
            evaluations=self._budget - self._left,
        )

    def _price(self, name: str, queue: Sequence[WaitingGroup]) -> float:
        self._left -= 1
        return queue_cost(self._instances[name], queue)

    def _start(
        self,
        current: Mapping[str, Sequence[int]],
        order: Callable[[WaitingGroup], tuple[float | str, ...]] | None = None,
    ) -> None:
        """The groups of ``current`` as they stand there, then the others where they cost least."""
        groups = {group.id: group for group in self._problem.groups}
        self._queues = {instance.id: [] for instance in self._problem.instances}
        self._costs = dict.fromkeys(self._queues, 0.0)
        for name, ids in current.items():
            if name in self._queues:
                self._queues[name] = [groups.pop(g) for g in ids if g in groups]
        for name, queue in self._queues.items():
            if queue:
                self._costs[name] = self._price(name, queue)
        for group in sorted(groups.values(), key=order or _by_deadline):
            self._insert(group)

    def _insert(self, group: WaitingGroup) -> None:
        added, name, position = self._best_place(group)
        self._queues[name].insert(position, group)
        self._costs[name] += added

    def _best_place(self, group: WaitingGroup) -> tuple[float, str, int]:
        """(cost added, instance, position) of the cheapest insertion."""
        best: tuple[float, str, int] | None = None
        for instance in self._problem.instances:
            if instance.kind not in group.service:
                continue
            queue = self._queues[instance.id]
            before = self._costs[instance.id]
            for position in insertion_points(queue, group):
                trial = [*queue[:position], group, *queue[position:]]
                added = self._price(instance.id, trial) - before
                if best is None or added < best[0] - _GAIN:
                    best = (added, instance.id, position)
        assert best is not None, f"no instance can serve group {group.id} of model {group.model}"
        return best

    def _improve(self) -> None:
        """Take groups out and put them back where they cost least, until nothing improves."""
        improved = True
        while improved and self._left > 0:
            improved = False
            for name in sorted(self._queues, key=lambda n: (-self._costs[n], n)):
                for group in list(self._queues[name]):
                    if self._left <= 0:
                        return
                    improved |= self._move(name, group)
                improved |= self._reorder_visits(name)

    def _move(self, name: str, group: WaitingGroup) -> bool:
        queue = self._queues[name]
        cost = self._costs[name]
        position = queue.index(group)
        rest = queue[:position] + queue[position + 1 :]
        saved = cost - self._price(name, rest)
        if saved <= _GAIN:
            return False
        self._queues[name] = rest
        self._costs[name] = cost - saved
        added, target, place = self._best_place(group)
        if added < saved - _GAIN:
            self._queues[target].insert(place, group)
            self._costs[target] += added
            return True
        self._queues[name] = queue
        self._costs[name] = cost
        return False

    def _reorder_visits(self, name: str) -> bool:
        """Exchange neighbouring visits to models where that costs less."""
        improved = False
        start = 0
        while self._left > 0:
            queue = self._queues[name]
            bounds = [p for p in visit_starts(queue) if p >= start]
            if len(bounds) < 2:
                return improved
            first, second = bounds[0], bounds[1]
            end = bounds[2] if len(bounds) > 2 else len(queue)
            trial = queue[:first] + queue[second:end] + queue[first:second] + queue[end:]
            cost = self._price(name, trial)
            if cost < self._costs[name] - _GAIN:
                self._queues[name] = trial
                self._costs[name] = cost
                improved = True
            start = second
        return improved


def _by_deadline(group: WaitingGroup) -> tuple[float | str, ...]:
    return group.first_deadline_s, group.id


def _by_length(group: WaitingGroup) -> tuple[float | str, ...]:
    """Least work per weight first: what to serve when not all can be met."""
    service = next(iter(group.service.values()))
    return (service.prefill_s + service.decode_s) / group.weight, group.id


def _by_model(group: WaitingGroup) -> tuple[float | str, ...]:
    return group.model, group.first_deadline_s, group.id


def visit_starts(queue: Sequence[WaitingGroup]) -> list[int]:
    """Positions at which the model changes; a visit is what is served between two swaps."""
    return [p for p in range(len(queue)) if p == 0 or queue[p].model != queue[p - 1].model]


def insertion_points(queue: Sequence[WaitingGroup], group: WaitingGroup) -> list[int]:
    """Positions worth trying, the one to keep at equal cost first.

    In deadline order in each visit to the group's model, at the end of such a visit, at the end of the
    queue, and before each visit.
    """
    points: dict[int, None] = {}
    starts = visit_starts(queue)
    for index, start in enumerate(starts):
        if queue[start].model == group.model:
            end = starts[index + 1] if index + 1 < len(starts) else len(queue)
            at = start
            while at < end and queue[at].first_deadline_s <= group.first_deadline_s:
                at += 1
            points[at] = None
            points[end] = None
    points[len(queue)] = None
    points.update(dict.fromkeys(starts if len(queue) > SHORT_QUEUE else range(len(queue))))
    return list(points)


def solve(problem: PlanProblem, budget: int = BUDGET) -> Plan:
    """A good plan for ``problem``, found within ``budget`` priced queues (a little more to finish)."""
    return Search(problem, budget).solve()


def insertion(
    instances: Sequence[InstanceState],
    queues: Mapping[str, Sequence[WaitingGroup]],
    group: WaitingGroup,
) -> tuple[str, int]:
    """Where one new group costs least: (instance, position). For placement between two plans."""
    best: tuple[float, str, int] | None = None
    for instance in instances:
        if instance.kind not in group.service:
            continue
        queue = queues[instance.id]
        before = queue_cost(instance, queue) if queue else 0.0
        for position in insertion_points(queue, group):
            trial = [*queue[:position], group, *queue[position:]]
            added = queue_cost(instance, trial) - before
            if best is None or added < best[0] - _GAIN:
                best = (added, instance.id, position)
    assert best is not None, f"no instance can serve group {group.id} of model {group.model}"
    return best[1], best[2]
