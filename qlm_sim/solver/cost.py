"""What a queue of groups costs on an instance: the one definition that every solver is priced by.

Weighted SLO misses come first, then lateness, then swaps and waiting. All are expectations: whether
a group meets its deadline is a probability, because its waiting time is a sum of many service times
and so about normal (Patke et al., section 5).
"""

from collections.abc import Iterable, Mapping, Sequence
from math import erf, inf, sqrt
from typing import NamedTuple

from qlm_sim.core.plan import InstanceState, PlanProblem, WaitingGroup

MISS = 1.0
LATENESS_PER_S = 1e-4
"""One miss weighs as much as 10,000 seconds of lateness: lateness never buys a miss back."""
SWAP_PER_S = 1e-5
"""Per second of clearing and loading, and per running request that is moved away for it."""
WAIT_PER_S2 = 5e-6
"""By the square of the seconds until an instance is through: idle instances are used, and no work is cut
short by swaps for nothing. What waits costs the seconds of its work times those that it waits, which is the
same in any order. To count requests instead would serve short work first and make the mean wait shorter, but
some would be overtaken again and again, and nobody could be told when their turn is."""
DECISION_S = 0.25
"""Least uncertainty of a waiting time in seconds: one decision and one iteration."""
DRIFT = 0.02
"""Uncertainty that grows with the time ahead, as a share of it."""


class Task(NamedTuple):
    """A WaitingGroup and its GroupService on one kind of instance, in one tuple for speed.

    Counts are floats, as sums of mixed numbers take three times as long.
    """

    model: str
    requests: float
    prefill_s: float
    decode_s: float
    decode_var: float
    """Variance of decode_s, in s²."""
    batch: float
    first_deadline_s: float
    last_deadline_s: float
    weight: float
    """What it costs to miss all its requests."""
    decided: bool
    id: int


State = tuple[float, float, str | None, float, float, float, float, float, float]
"""An instance on its way through a queue: seconds from now, their variance, loaded model, share of a batch
that is free, requests running, cost so far, the part of it for waiting, seconds of work that swaps have cut
short, and those that the next one would."""


def task(group: WaitingGroup, kind: str) -> Task:
    service = group.service[kind]
    return Task(
        group.model,
        float(group.requests),
        service.prefill_s,
        service.decode_s,
        service.decode_sd_s**2,
        float(service.batch),
        group.first_deadline_s,
        group.last_deadline_s,
        group.weight * group.requests,
        group.decided,
        group.id,
    )


def beginning(instance: InstanceState) -> State:
    """The state before the first group."""
    running = float(instance.running)
    return instance.ready_s, 0.0, instance.model, instance.free, running, 0.0, 0.0, 0.0, instance.running_s


def follow(
    state: State,
    tasks: Iterable[Task],
    leave_s: float,
    swap_s: Mapping[str, float],
    limit: float = inf,
    trail: list[State] | None = None,
) -> float:
    """Expected cost of ``state`` and of serving ``tasks`` from there in that order; inf above ``limit``.

    Requests that find room start at once, one prefill after the other; the rest start as running ones
    depart, one every ``decode_s``. Each change of model clears the batch away and loads the next one; what is
    evicted goes on at some later time, which nobody is late for but all wait for.
    The cost never falls along a queue. ``trail`` gets the state after each task.
    """
    clock_s, variance, model, free, running, cost, waiting, undone_s, running_s = state
    before_s = clock_s + undone_s
    for wanted, n, prefill_s, decode_s, decode_var, batch, first_s, last_s, weight, decided, _ in tasks:
        if wanted != model:
            change_s = leave_s + swap_s[wanted]
            clock_s += change_s
            cost += SWAP_PER_S * change_s * (running if running > 1.0 else 1.0)
            model = wanted
            running = 0.0
            free = 1.0
            undone_s += running_s
        start_s = clock_s + prefill_s
        behind = n - free * batch
        clock_s += n * prefill_s
        if behind > 0.0:
            clock_s += behind * decode_s
            variance += behind * decode_var
            free = 0.0
        else:
            free -= n / batch
        running += n
        if running > batch:
            running = batch
        running_s = running * decode_s
        through_s = clock_s + undone_s
        waited = WAIT_PER_S2 * (through_s * through_s - before_s * before_s)
        before_s = through_s
        waiting += waited
        cost += waited
        sd_s = sqrt(variance) + DECISION_S + DRIFT * clock_s
        first_late_s = start_s - first_s
        last_late_s = clock_s - last_s
        near_s = -4.0 * sd_s
        if first_late_s > near_s or last_late_s > near_s:
            cost += weight * _lateness(first_late_s, last_late_s, sd_s, decided)
        if cost > limit:
            return inf
        if trail is not None:
            trail.append((clock_s, variance, model, free, running, cost, waiting, undone_s, running_s))
    return cost


def _lateness(first_s: float, last_s: float, sd_s: float, decided: bool) -> float:
    """Cost per request of a group by its share of late requests and their mean lateness.

    Lateness runs evenly from ``first_s`` (the first request's) to ``last_s`` (the last one's), each
    blurred by ``sd_s``. Five points along the group stand for all.
    """
    if first_s > 4.0 * sd_s and last_s > 4.0 * sd_s:
        return (0.0 if decided else MISS) + LATENESS_PER_S * 0.5 * (first_s + last_s)
    step = (last_s - first_s) / 4.0
    second_s, third_s, fourth_s = first_s + step, first_s + 2.0 * step, first_s + 3.0 * step
    late_s = (
        (first_s if first_s > 0.0 else 0.0)
        + (second_s if second_s > 0.0 else 0.0)
        + (third_s if third_s > 0.0 else 0.0)
        + (fourth_s if fourth_s > 0.0 else 0.0)
        + (last_s if last_s > 0.0 else 0.0)
    )
    if decided:
        return LATENESS_PER_S * late_s / 5.0
    scale = 0.7071067811865476 / sd_s
    missed = (
        (0.5 + 0.5 * erf(first_s * scale))
        + (0.5 + 0.5 * erf(second_s * scale))
        + (0.5 + 0.5 * erf(third_s * scale))
        + (0.5 + 0.5 * erf(fourth_s * scale))
        + (0.5 + 0.5 * erf(last_s * scale))
    )
    return (MISS * missed + LATENESS_PER_S * late_s) / 5.0


def queue_cost(instance: InstanceState, queue: Sequence[WaitingGroup]) -> float:
    """Expected cost of serving ``queue`` in that order on ``instance``."""
    tasks = [task(group, instance.kind) for group in queue]
    return follow(beginning(instance), tasks, instance.leave_s, instance.swap_s)


def plan_cost(problem: PlanProblem, queues: Mapping[str, Sequence[int]]) -> float:
    """Cost of a whole plan: group ids by instance, in serving order."""
    groups = {group.id: group for group in problem.groups}
    return sum(
        queue_cost(instance, [groups[g] for g in queues.get(instance.id, ())])
        for instance in problem.instances
    )
