"""The order of deadlines, where nothing is at stake; within a class that is first come, first served.

Groups of a visit cost about the same in any order, and a search ends with one of them. Who is due first has
most to fear of what is still to come; and were some overtaken again and again, nobody could be told when
their turn is.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from operator import attrgetter

from qlm_sim.core.plan import InstanceState, PlanProblem, WaitingGroup
from qlm_sim.solver.cost import Task, task
from qlm_sim.solver.queues import CLOCK_S, Queue, visit_starts

AT_STAKE = 0.005
"""Missed requests, lateness and swaps in their cost, that turns may add to a planned queue."""

DEARER = 0.01
"""Share of its cost, waiting included, that turns may add to a plan."""

MOST_PRICED = 5_000
"""Groups that are priced anew to put a plan in turn over instances: a twelfth of what a search may."""


def in_turn(problem: PlanProblem, planned: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The queues ``planned`` in the order of deadlines, save where that costs more than it may.

    Inside each visit to a model, of all classes or else of each; then, where models take turns, of each model
    and class over all instances, by when its groups would be begun.
    """
    groups = {group.id: group for group in problem.groups}
    known = {
        instance.id: [groups[g] for g in planned.get(instance.id, ()) if g in groups]
        for instance in problem.instances
    }
    over_instances = len(problem.instances) > 1 and len({group.model for group in problem.groups}) > 1
    out_of_turn = {name for name, queue in known.items() if not _is_in_turn(queue)}
    queues = []
    for index, instance in enumerate(problem.instances):
        if over_instances or instance.id in out_of_turn:
            queue = Queue(instance, index)
            queue.replace([task(group, instance.kind) for group in known[instance.id]])
            queues.append(queue)
    limits = _Limits(queues)
    for queue in queues:
        if queue.instance.id in out_of_turn:
            _turn_visits(queue, known[queue.instance.id], limits)
    if over_instances:
        _turn_over_instances(queues, groups, limits)
    turned = {queue.instance.id: tuple([each.id for each in queue.tasks]) for queue in queues}
    return {name: tuple([group.id for group in queue]) for name, queue in known.items()} | turned


class _Limits:
    """What queues may cost with their groups in turn: little more than as planned."""

    def __init__(self, queues: Sequence[Queue]) -> None:
        self._planned = {queue.index: (queue.at_stake(), queue.cost) for queue in queues}
        self.priced = 0
        """Groups priced anew."""

    def put(self, turned: Mapping[int, list[Task]], queues: Sequence[Queue]) -> bool:
        """Put the tasks of ``turned``, by index, into ``queues``, unless all would then cost too much."""
        saved = [queue.save() for queue in queues]
        for queue in queues:
            tasks = turned.get(queue.index, queue.tasks)
            if tasks != queue.tasks:
                first = next(place for place, each in enumerate(queue.tasks) if tasks[place] != each)
                queue.replace(tasks, first)
                self.priced += len(tasks) - first
        planned = [self._planned[queue.index] for queue in queues]
        held = sum([queue.at_stake() for queue in queues]) <= sum([p[0] + AT_STAKE for p in planned]) and sum(
            [queue.cost for queue in queues]
        ) <= sum([p[1] for p in planned]) * (1 + DEARER)
        if not held:
            for queue, state in zip(queues, saved, strict=True):
                queue.restore(state)
        return held


def _turn_visits(queue: Queue, known: Sequence[WaitingGroup], limits: _Limits) -> None:
    for decided in (False, True):
        classes: dict[str, set[int]] = {}
        for group in known:
            if group.decided is decided:
                classes.setdefault(group.slo_class, set()).add(group.id)
        everyone = set().union(*classes.values())
        if not _turn(queue, everyone, limits) and len(classes) > 1:
            for ids in classes.values():
                _turn(queue, ids, limits)


def _turn(queue: Queue, ids: set[int], limits: _Limits) -> bool:
    """Put those of ``ids`` in turn, if that costs no more than it may."""
    tasks = _sorted(queue.tasks, ids)
    return tasks == queue.tasks or limits.put({queue.index: tasks}, [queue])


def _turn_over_instances(
    queues: Sequence[Queue], groups: Mapping[int, WaitingGroup], limits: _Limits
) -> None:
    """All kinds at once or else, where that costs too much, one after the other, those that are begun last
    first: least is behind them."""
    places: dict[tuple[str, str, bool], list[tuple[Queue, int]]] = {}
    for queue in queues:
        for place, each in enumerate(queue.tasks):
            kind = each.model, groups[each.id].slo_class, each.decided
            places.setdefault(kind, []).append((queue, place))
    orders = []
    for shared in places.values():
        shared.sort(key=lambda each: (each[0].trail[each[1]][CLOCK_S], each[0].index))
        begun = [groups[queue.tasks[place].id] for queue, place in shared]
        ordered = sorted(begun, key=attrgetter("first_deadline_s", "id"))
        if ordered != begun:
            orders.append(list(zip(shared, ordered, strict=True)))

    def put(order: Sequence[tuple[tuple[Queue, int], WaitingGroup]]) -> bool:
        turned = {queue.index: [*queue.tasks] for (queue, _), _ in order}
        for (queue, place), group in order:
            if queue.tasks[place].id != group.id:
                turned[queue.index][place] = task(group, queue.kind)
        return limits.put(turned, queues)

    most = limits.priced + MOST_PRICED
    if not put([*chain(*orders)]):
        orders.sort(key=lambda order: order[0][0][0].trail[order[0][0][1]][CLOCK_S], reverse=True)
        for order in orders:
            if limits.priced < most:
                put(order)


def _is_in_turn(queue: Sequence[WaitingGroup]) -> bool:
    """Whether groups stand in the order of their deadlines inside each visit; decided ones by themselves."""
    model = None
    last: dict[bool, tuple[float, int]] = {}
    for group in queue:
        if group.model != model:
            model = group.model
            last.clear()
        rank = group.first_deadline_s, group.id
        if rank < last.get(group.decided, rank):
            return False
        last[group.decided] = rank
    return True


def _sorted(tasks: list[Task], ids: set[int]) -> list[Task]:
    """``tasks``, with those of ``ids`` by deadline in the places that they have in each visit."""
    tasks = list(tasks)
    starts = [*visit_starts(tasks), len(tasks)]
    for start, end in pairwise(starts):
        places = [p for p in range(start, end) if tasks[p].id in ids]
        ordered = sorted((tasks[p] for p in places), key=lambda each: (each.first_deadline_s, each.id))
        for place, each in zip(places, ordered, strict=True):
            tasks[place] = each
    return tasks


def behind_its_like(
    instance: InstanceState, queue: Sequence[WaitingGroup], group: WaitingGroup, position: int
) -> int:
    """Where to put a new group that would cost least at ``position``: behind the last one of its class in
    that visit, save where more would be missed or late for it."""
    behind = position
    for at in range(position, len(queue)):
        other = queue[at]
        if other.model != group.model:
            break
        if other.slo_class == group.slo_class and other.decided == group.decided:
            behind = at + 1
    if behind == position:
        return position
    stakes = []
    for at in (position, behind):
        priced = Queue(instance, 0)
        priced.replace([task(each, instance.kind) for each in (*queue[:at], group, *queue[at:])])
        stakes.append(priced.at_stake())
    return behind if stakes[1] <= stakes[0] + AT_STAKE else position
