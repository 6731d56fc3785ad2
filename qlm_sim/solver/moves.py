"""Changes to a plan under search: inserting, moving and exchanging groups, each where it costs least.

Counts what it does against a budget, in groups followed through queues, and knows nothing of when to stop.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import inf
from random import Random

from qlm_sim.core.plan import PlanProblem
from qlm_sim.solver.cost import Task, task
from qlm_sim.solver.queues import COST, Queue, Saved, insertion_points, visit_starts
from qlm_sim.solver.starts import by_deadline

MANY_INSTANCES = 12
"""Where there are more, a group is tried on a sample of this size."""
DEAREST = 4
"""How many of the dearest groups are tried for an exchange."""
GAIN = 1e-9
"""Less than this is rounding."""


class Moves:
    """The queues of a plan, and the ways to change them."""

    def __init__(self, problem: PlanProblem, budget: int) -> None:
        self.problem = problem
        self.queues = [Queue(instance, index) for index, instance in enumerate(problem.instances)]
        self.left = budget
        """Groups that may still be followed."""
        self._tasks: dict[str, dict[int, Task]] = {
            kind: {group.id: task(group, kind) for group in problem.groups if kind in group.service}
            for kind in sorted({instance.kind for instance in problem.instances})
        }

    @cached_property
    def random(self) -> Random:
        """Seeded by the problem's number."""
        return Random(self.problem.number)

    def cost(self) -> float:
        return sum(queue.cost for queue in self.queues)

    def at_stake(self) -> float:
        """Cost of the plan apart from waiting."""
        return sum(queue.at_stake() for queue in self.queues)

    def plan(self) -> dict[str, tuple[int, ...]]:
        """Group ids by instance, in serving order."""
        return {queue.instance.id: tuple(task.id for task in queue.tasks) for queue in self.queues}

    def save(self) -> list[Saved]:
        return [queue.save() for queue in self.queues]

    def restore(self, saved: Sequence[Saved]) -> None:
        for queue, each in zip(self.queues, saved, strict=True):
            queue.restore(each)

    def set(self, queue: Queue, tasks: list[Task], start: int = 0) -> None:
        """Let the queue serve ``tasks``, of which the first ``start`` are those of before."""
        self.left -= len(tasks) - start
        queue.replace(tasks, start)

    def start_from(self, queues: Mapping[str, Sequence[int]], placing: int = 0) -> None:
        """The groups of ``queues`` as they stand there, then the others where they cost least.

        Once less than ``placing`` is left of the budget, those go to the ends of queues.
        """
        missing = {group.id: group for group in self.problem.groups}
        for queue in self.queues:
            ids = [g for g in queues.get(queue.instance.id, ()) if missing.pop(g, None) is not None]
            self.set(queue, [self._tasks[queue.kind][g] for g in ids])
        for group in sorted(missing.values(), key=by_deadline):
            self.insert((group.id,), at_end=self.left < placing)

    def insert(
        self, block: tuple[int, ...], *, below: float = inf, blink: float = 0.0, at_end: bool = False
    ) -> bool:
        """Put groups, one behind the other, where they cost least, if that adds less than ``below``.

        Positions are priced in full in the order of a lower bound, until none can be better. Each is
        overlooked with probability ``blink``.
        """
        blocks = {
            kind: [tasks[g] for g in block]
            for kind, tasks in self._tasks.items()
            if tasks.keys() >= set(block)
        }
        able = [queue for queue in self.queues if queue.kind in blocks]
        assert able, f"no instance can serve group {block[0]}"
        if len(able) > MANY_INSTANCES:
            able = self.random.sample(able, MANY_INSTANCES)
        bounds: list[tuple[float, int, int, int]] = []
        for queue in able:
            tasks = blocks[queue.kind]
            points = [len(queue.tasks)] if at_end else insertion_points(queue.tasks, tasks[0])
            if blink:
                points = [position for position in points if self.random.random() >= blink]
            self.left -= 2 * len(points) * len(tasks)
            for order, position in enumerate(points):
                bound = queue.insertion_bound(position, tasks, below)
                if bound < below:
                    bounds.append((bound, queue.index, order, position))
        bounds.sort()
        best = None
        for bound, index, _, position in bounds:
            if bound >= below - GAIN:
                break
            queue = self.queues[index]
            rest = blocks[queue.kind] + queue.tasks[position:]
            self.left -= len(rest)
            added = queue.price(position, rest, queue.cost + below) - queue.cost
            if added < below - GAIN:
                below, best = added, (queue, position)
        if best is None:
            # All were overlooked, or none is good enough.
            return self.insert(block) if blink and below == inf else False
        queue, position = best
        self.set(queue, queue.tasks[:position] + blocks[queue.kind] + queue.tasks[position:], position)
        return True

    def descend(self, budget: int) -> None:
        """Move and exchange groups and visits until nothing lowers the cost or the budget is spent."""
        stop = self.left - budget
        improved = True
        while improved and self.left > stop:
            improved = False
            for queue in sorted(self.queues, key=lambda queue: (-queue.cost, queue.index)):
                for group in [each.id for each in queue.tasks]:
                    if self.left <= stop:
                        return
                    ids = [each.id for each in queue.tasks]
                    if group in ids:
                        position = ids.index(group)
                        improved |= self._move(queue, position, position + 1)
                improved |= self._move_visits(queue, stop)
            improved = improved or self._exchange_dearest(stop) or self._exchange_ends(stop)

    def _move(self, queue: Queue, start: int, end: int) -> bool:
        """Move the groups from ``start`` to ``end`` together to where they cost least."""
        rest = queue.tasks[end:]
        self.left -= len(rest)
        saved = queue.cost - queue.price(start, rest, inf)
        if saved <= GAIN:
            return False
        before = queue.save()
        block = tuple(task.id for task in queue.tasks[start:end])
        self.set(queue, queue.tasks[:start] + rest, start)
        if self.insert(block, below=saved):
            return True
        queue.restore(before)
        return False

    def _move_visits(self, queue: Queue, stop: int) -> bool:
        improved = False
        visit = 0
        while self.left > stop:
            starts = [*visit_starts(queue.tasks), len(queue.tasks)]
            if visit >= len(starts) - 1:
                break
            start, end = starts[visit], starts[visit + 1]
            if end - start > 1:
                improved |= self._move(queue, start, end)
            visit += 1
        return improved

    def _exchange_dearest(self, stop: int) -> bool:
        """Exchange one of the dearest groups with a group of another queue, if that lowers the cost."""
        dearest = sorted(
            (queue.trail[p][COST] - queue.trail[p + 1][COST], queue.index, p)
            for queue in self.queues
            for p in range(len(queue.tasks))
        )
        for _, index, position in dearest[:DEAREST]:
            if self.left <= stop:
                return False
            if self._exchange(self.queues[index], position):
                return True
        return False

    def _exchange_ends(self, stop: int) -> bool:
        """Exchange all that two queues serve from some visit on, if that lowers the cost: what no move of
        a single group or visit can do without making things worse on the way."""
        queues = sorted(self.queues, key=lambda queue: (-queue.cost, queue.index))
        for queue in queues[:DEAREST]:
            others = [other for other in self.queues if other is not queue]
            if len(others) > MANY_INSTANCES:
                others = self.random.sample(others, MANY_INSTANCES)
            for other in others:
                if self.left <= stop:
                    return False
                if self._exchange_ends_of(queue, other):
                    return True
        return False

    def _exchange_ends_of(self, queue: Queue, other: Queue) -> bool:
        mine, theirs = self._tasks[queue.kind], self._tasks[other.kind]
        limit = queue.cost + other.cost - GAIN
        best = None
        cuts = [*visit_starts(other.tasks), len(other.tasks)]
        for at in [*visit_starts(queue.tasks), len(queue.tasks)]:
            going = queue.tasks[at:]
            if not all(task.id in theirs for task in going):
                continue
            gone = [theirs[task.id] for task in going]
            for cut in cuts:
                coming = other.tasks[cut:]
                if not (going or coming) or not all(task.id in mine for task in coming):
                    continue
                come = [mine[task.id] for task in coming]
                self.left -= len(come) + len(gone)
                cost = queue.price(at, come, limit)
                if cost < limit:
                    cost += other.price(cut, gone, limit - cost)
                    if cost < limit:
                        limit, best = cost, (at, come, cut, gone)
        if best is None:
            return False
        at, come, cut, gone = best
        self.set(queue, queue.tasks[:at] + come, at)
        self.set(other, other.tasks[:cut] + gone, cut)
        return True

    def _exchange(self, queue: Queue, position: int) -> bool:
        group = queue.tasks[position].id
        behind = queue.tasks[position + 1 :]
        others = [other for other in self.queues if other is not queue and group in self._tasks[other.kind]]
        if len(others) > MANY_INSTANCES:
            others = self.random.sample(others, MANY_INSTANCES)
        best = None
        most = GAIN
        for other in others:
            mine = self._tasks[other.kind][group]
            limit = queue.cost + other.cost - most
            for p, theirs in enumerate(other.tasks):
                there = self._tasks[queue.kind].get(theirs.id)
                if there is None:
                    continue
                first, second = [there, *behind], [mine, *other.tasks[p + 1 :]]
                self.left -= len(first)
                cost = queue.price(position, first, limit)
                if cost < limit:
                    self.left -= len(second)
                    cost += other.price(p, second, limit - cost)
                    if cost < limit:
                        limit = cost
                        most = queue.cost + other.cost - cost
                        best = (other, p, first, second)
        if best is None:
            return False
        other, p, first, second = best
        self.set(queue, queue.tasks[:position] + first, position)
        self.set(other, other.tasks[:p] + second, p)
        return True
