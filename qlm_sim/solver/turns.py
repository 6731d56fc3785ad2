"""The order of deadlines, where nothing is at stake; within a class that is first come, first served.

To serve the shorter work first makes the mean wait shorter, and so the solver does; between groups of one
model that is noise of a few prompts, for which some would be overtaken again and again, and nobody could be
told when their turn is. And who is due first has most to fear of what is still to come.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import attrgetter

from qlm_sim.core.plan import InstanceState, PlanProblem, WaitingGroup
from qlm_sim.solver.cost import Task, task
from qlm_sim.solver.queues import CLOCK_S, Queue, visit_starts

AT_STAKE = 0.005
"""Missed requests, lateness and swaps in their cost, that an order by turn may add to a queue."""

MOST_OVER_INSTANCES = 512
"""Most groups of a plan that is put in turn over all instances. To price more anew, once for every model and
class, would take longer than the search."""


def in_turn(problem: PlanProblem, queues: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """``queues`` in the order of deadlines, save where more would be missed or late for it.

    Inside each visit to a model, of all classes or else of each; then, where models take turns, of each model
    and class over all instances, by when its groups would be begun.
    """
    groups = {group.id: group for group in problem.groups}
    result = {name: tuple(queue) for name, queue in queues.items()}
    for index, instance in enumerate(problem.instances):
        planned = result.get(instance.id, ())
        if len(planned) < 2:
            continue
        known = [groups[g] for g in planned if g in groups]
        if _is_in_turn(known):
            result[instance.id] = tuple([group.id for group in known])
            continue
        tasks = [task(group, instance.kind) for group in known]
        queue = Queue(instance, index)
        alike = [{group.id for group in known if group.decided is decided} for decided in (False, True)]
        kinds = {group.id: (group.slo_class, group.decided) for group in known}
        alike += [{g for g in kinds if kinds[g] == kind} for kind in dict.fromkeys(kinds.values())]
        for ids in alike:
            turned = _sorted(tasks, ids)
            if turned == tasks:
                continue
            if not queue.tasks:
                queue.replace(tasks)
            before, saved = queue.at_stake(), queue.save()
            queue.replace(turned)
            if queue.at_stake() <= before + AT_STAKE:
                tasks = turned
            else:
                queue.restore(saved)
        result[instance.id] = tuple(each.id for each in tasks)
    several = len(problem.instances) > 1 and len({group.model for group in problem.groups}) > 1
    if several and len(problem.groups) <= MOST_OVER_INSTANCES:
        _turn_over_instances(problem, groups, result)
    return result


def _turn_over_instances(
    problem: PlanProblem, groups: Mapping[int, WaitingGroup], planned: dict[str, tuple[int, ...]]
) -> None:
    places: dict[tuple[str, str, bool], list[tuple[Queue, int]]] = {}
    for index, instance in enumerate(problem.instances):
        queue = Queue(instance, index)
        queue.replace([task(groups[g], instance.kind) for g in planned.get(instance.id, ()) if g in groups])
        for place, each in enumerate(queue.tasks):
            kind = each.model, groups[each.id].slo_class, each.decided
            places.setdefault(kind, []).append((queue, place))
    for shared in places.values():
        touched = list({queue.index: queue for queue, _ in shared}.values())
        if len(touched) < 2:
            continue
        shared.sort(key=lambda each: (each[0].trail[each[1]][CLOCK_S], each[0].index))
        waiting = [queue.tasks[place] for queue, place in shared]
        ordered = sorted(waiting, key=attrgetter("first_deadline_s", "id"))
        if ordered == waiting:
            continue
        before, saved = sum(queue.at_stake() for queue in touched), [queue.save() for queue in touched]
        tasks = {queue.index: list(queue.tasks) for queue in touched}
        for (queue, place), each in zip(shared, ordered, strict=True):
            tasks[queue.index][place] = task(groups[each.id], queue.kind)
        for queue in touched:
            queue.replace(tasks[queue.index])
        if sum(queue.at_stake() for queue in touched) > before + AT_STAKE:
            for queue, state in zip(touched, saved, strict=True):
                queue.restore(state)
        planned |= {queue.instance.id: tuple(each.id for each in queue.tasks) for queue in touched}


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
