"""What a queue of groups costs on an instance: the one definition that every solver is priced by.

Weighted SLO misses come first, then lateness, then swaps and waiting. All are expectations: whether
a group meets its deadline is a probability, because its waiting time is a sum of many service times
and so about normal (Patke et al., section 5).
"""

from collections.abc import Mapping, Sequence
from math import erf, sqrt

from qlm_sim.core.plan import InstanceState, PlanProblem, WaitingGroup

MISS = 1.0
LATENESS_PER_S = 1e-4
"""One miss weighs as much as 10,000 seconds of lateness: lateness never buys a miss back."""
SWAP_PER_S = 1e-5
"""Per second of clearing and loading, and per running request that is moved away for it."""
WAIT_PER_S = 1e-6
"""Per second and request: so that idle instances are used, and short work goes first."""
DECISION_S = 0.25
"""Least uncertainty of a waiting time in seconds: one decision and one iteration."""


def queue_cost(instance: InstanceState, queue: Sequence[WaitingGroup]) -> float:
    """Expected cost of serving ``queue`` in that order on ``instance``.

    Follows the instance through the queue. Requests that find room start at once, one prefill after
    the other; the rest start as running ones depart, one every ``decode_s``. Each change of model
    clears the batch away and loads the next one.
    """
    clock_s = instance.ready_s
    variance = 0.0
    model = instance.model
    free = instance.free
    leave_s = instance.leave_s
    moved = float(instance.running)
    cost = 0.0
    for group in queue:
        service = group.service[instance.kind]
        n = group.requests
        if group.model != model:
            swap_s = instance.swap_s[group.model]
            clock_s += leave_s + swap_s
            cost += SWAP_PER_S * (leave_s + swap_s) * max(1.0, moved)
            model = group.model
            moved = service.batch
            free = service.batch
        start_s = clock_s + service.prefill_s
        behind = n - free
        clock_s += n * service.prefill_s
        if behind > 0.0:
            clock_s += behind * service.decode_s
            variance += behind * service.decode_sd_s**2
            free = 0.0
        else:
            free -= n
        sd_s = sqrt(variance) + DECISION_S + 0.02 * clock_s
        missed, late_s = _lateness(start_s - group.first_deadline_s, clock_s - group.last_deadline_s, sd_s)
        weight = group.weight * n
        if not group.decided:
            cost += MISS * weight * missed
        cost += weight * (LATENESS_PER_S * late_s + WAIT_PER_S * (start_s + clock_s))
    return cost


def _lateness(first_s: float, last_s: float, sd_s: float) -> tuple[float, float]:
    """Expected share of requests that are late, and mean seconds by which, positive part.

    Lateness runs evenly from ``first_s`` (the first request's) to ``last_s`` (the last one's), each
    blurred by ``sd_s``. Five points along the group stand for all.
    """
    step = (last_s - first_s) / 4
    if first_s < -4 * sd_s and last_s < -4 * sd_s:
        return 0.0, 0.0
    missed = 0.0
    late_s = 0.0
    scale = 1 / (sd_s * 1.4142135623730951)
    for i in range(5):
        late = first_s + i * step
        missed += 0.5 + 0.5 * erf(late * scale)
        if late > 0.0:
            late_s += late
    return missed / 5, late_s / 5


def plan_cost(problem: PlanProblem, queues: Mapping[str, Sequence[int]]) -> float:
    """Cost of a whole plan: group ids by instance, in serving order."""
    groups = {group.id: group for group in problem.groups}
    return sum(
        queue_cost(instance, [groups[g] for g in queues.get(instance.id, ())])
        for instance in problem.instances
    )
