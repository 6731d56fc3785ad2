"""Whole plans by rule, in little more than sorting time: where a search may start.

They reckon with expected times alone, as ``cost.follow`` does; what they are worth is for it to say.
"""

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from math import inf

from qlm_sim.core.plan import PlanProblem, WaitingGroup

Order = Callable[[WaitingGroup], tuple[float | str, ...]]


def by_deadline(group: WaitingGroup) -> tuple[float | str, ...]:
    return group.first_deadline_s, group.id


def by_length(group: WaitingGroup) -> tuple[float | str, ...]:
    """Least work per weight first: what to serve when not all can be met."""
    service = next(iter(group.service.values()))
    return (service.prefill_s + service.decode_s) / group.weight, group.id


def edf_queues(problem: PlanProblem) -> dict[str, tuple[int, ...]]:
    """Earliest deadline first over all instances: each group where it is done first."""
    cluster = _Cluster(problem)
    for group in sorted(problem.groups, key=by_deadline):
        _, done_s, index = cluster.soonest(group)
        cluster.serve(group, done_s, index)
    return {name: tuple(group.id for group in queue) for name, queue in cluster.queues.items()}


def relegating_queues(problem: PlanProblem) -> dict[str, tuple[int, ...]]:
    """Earliest deadline first, save that a group which would mostly be late lets all the others pass.

    So what can be met is met, as in Moore and Hodgson's rule. The relegated stand at the ends of the
    queues, the shortest first, in one visit per model.
    """
    cluster = _Cluster(problem)
    relegated = []
    for group in sorted(problem.groups, key=by_deadline):
        start_s, done_s, index = cluster.soonest(group, swap_factor=2.0)
        if group.decided or start_s + done_s > group.first_deadline_s + group.last_deadline_s:
            relegated.append(group)
        else:
            cluster.serve(group, done_s, index)
    met = {name: len(queue) for name, queue in cluster.queues.items()}
    for group in sorted(relegated, key=by_length):
        _, done_s, index = cluster.soonest(group, swap_factor=2.0)
        cluster.serve(group, done_s, index)
    queues = {}
    for instance in problem.instances:
        queue = cluster.queues[instance.id]
        first, rest = queue[: met[instance.id]], queue[met[instance.id] :]
        rest = _by_visits(rest, first[-1].model if first else instance.model)
        queues[instance.id] = tuple(group.id for group in (*first, *rest))
    return queues


class _Cluster:
    """When each instance is done with what it was given so far.

    Instances of one kind with one model differ by that time alone (room for a start without waiting
    apart), so a group needs to look at the first of each such class and no further.
    """

    def __init__(self, problem: PlanProblem) -> None:
        self._instances = problem.instances
        self._free = [instance.free for instance in problem.instances]
        self._classes: dict[str, dict[str | None, list[tuple[float, int]]]] = {}
        """By kind and loaded model: heap of (seconds until it is free, index)."""
        for index, instance in enumerate(problem.instances):
            heaps = self._classes.setdefault(instance.kind, {})
            heaps.setdefault(instance.model, []).append((instance.ready_s, index))
        for heaps in self._classes.values():
            for heap in heaps.values():
                heapify(heap)
        self.queues: dict[str, list[WaitingGroup]] = {instance.id: [] for instance in problem.instances}

    def soonest(self, group: WaitingGroup, swap_factor: float = 1.0) -> tuple[float, float, int]:
        """(start, done, instance's index) where the group is done first, a swap counting by that factor."""
        best = (0.0, 0.0, -1)
        least_s = inf
        n = group.requests
        model = group.model
        for kind, service in group.service.items():
            for loaded, heap in self._classes.get(kind, {}).items():
                if not heap:
                    continue
                start_s, index = heap[0]
                room = self._free[index] * service.batch
                rank_s = 0.0
                if loaded != model:
                    instance = self._instances[index]
                    change_s = instance.leave_s + instance.swap_s[model]
                    start_s += change_s
                    rank_s = (swap_factor - 1.0) * change_s
                    room = service.batch
                done_s = start_s + n * service.prefill_s
                if n > room:
                    done_s += (n - room) * service.decode_s
                rank_s += done_s
                if rank_s < least_s:
                    least_s = rank_s
                    best = (start_s, done_s, index)
        assert best[2] >= 0, f"no instance can serve group {group.id} of model {model}"
        return best

    def serve(self, group: WaitingGroup, done_s: float, index: int) -> None:
        """Put the group at the end of that instance's queue."""
        instance = self._instances[index]
        queue = self.queues[instance.id]
        heaps = self._classes[instance.kind]
        loaded = queue[-1].model if queue else instance.model
        heappop(heaps[loaded])
        free = self._free[index] if loaded == group.model else 1.0
        self._free[index] = max(0.0, free - group.requests / group.service[instance.kind].batch)
        heappush(heaps.setdefault(group.model, []), (done_s, index))
        queue.append(group)


def _by_visits(queue: Iterable[WaitingGroup], model: str | None) -> list[WaitingGroup]:
    """One visit to each model, the loaded one's first, then in the order in which they first stand there."""
    visits: dict[str, list[WaitingGroup]] = {}
    for group in queue:
        visits.setdefault(group.model, []).append(group)
    names = sorted(visits, key=lambda name: name != model)
    return [group for name in names for group in visits[name]]
