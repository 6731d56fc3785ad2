"""The global scheduler's own solver: starts by rule, descent, then ruin and recreate.

Anytime and deterministic: the budget counts groups followed through queues, never seconds, so a simulation
does not depend on the machine; chance comes from a generator seeded by the problem's number, so that the
searches of successive problems try different things. It leaves the plan in force only for one that is
worth it, so that plans do not flap.
"""

from collections.abc import Mapping, Sequence
from math import inf

from qlm_sim.core.plan import InstanceState, Plan, PlanProblem, WaitingGroup
from qlm_sim.solver.cost import task
from qlm_sim.solver.moves import GAIN, Moves
from qlm_sim.solver.queues import COST, Queue, Saved, insertion_points
from qlm_sim.solver.starts import by_deadline, by_length, edf_queues, relegating_queues

BUDGET = 60_000
"""Groups followed through queues per plan ..."""
MANY = 1_000
"""... and half of it for more groups than so many: passes over all of them take as long as the other half."""
NOTHING_AT_STAKE = 0.005
"""A plan whose misses, lateness and swaps cost less than this share of one missed request is good."""
WORTH_CHANGING = 0.02
"""Share of its cost that must be saved for the plan in force to be left for another, not only bettered."""
PATIENCE = 600
"""Rounds of ruin and recreate without a gain, after which the search for a first plan ends: mostly its budget
ends first."""
PATIENCE_IN_FORCE = 25
"""The same for the groups of the plan in force, on which earlier searches were spent."""
MOST_REMOVED = 8
"""Groups taken out in one round of ruin and recreate."""
MOST_REPLANNED = 16
"""The same where whole queues are emptied."""
ALIKE_EFFORT = 4
"""Groups followed per group, where all are of one model and class, in a descent from the plan in force:
enough for the dearest group or two, where the gain is. Twice as much, or starts by rule, meet no more SLOs of
an overloaded cluster; no descent at all meets 3 to 6 points fewer."""
BLINK = 0.1
"""Share of the positions that are overlooked when groups are put back, so that rounds differ."""
WORSE, WORST = 1.05, 1.1
"""How far the cost may rise in one round, and above the best, for the next round to go on from there."""


def solve(problem: PlanProblem, budget: int | None = None) -> Plan:
    """A good plan for ``problem``, found within ``budget`` groups followed, plus a few passes over all.

    None: ``BUDGET``, or half of it for many groups.
    """
    if budget is None:
        budget = BUDGET if len(problem.groups) <= MANY else BUDGET // 2
    moves = Moves(problem, budget)
    _search(moves, budget)
    return Plan(problem.number, moves.plan(), moves.cost(), evaluations=budget - moves.left)


def _search(moves: Moves, budget: int) -> None:
    problem = moves.problem
    in_force = any(problem.current.values())
    # Groups of one model and class differ by deadline alone: there is little to find, so little is spent.
    alike = in_force and len({(group.model, group.slo_class) for group in problem.groups}) == 1
    moves.start_from(problem.current, placing=budget // 2)
    if alike:
        if moves.at_stake() > NOTHING_AT_STAKE:
            moves.descend(ALIKE_EFFORT * len(problem.groups))
        return
    started, started_cost = moves.save(), moves.cost()
    by_rule: list[tuple[float, int, list[Saved]]] = []
    for rule in (edf_queues, relegating_queues):
        moves.start_from(rule(problem))
        by_rule.append((moves.cost(), len(by_rule), moves.save()))
    rule_cost, _, rule_queues = min(by_rule)
    moves.restore(started)
    moves.descend(moves.left if started_cost <= rule_cost else moves.left // 2)
    kept, kept_cost = moves.save(), moves.cost()
    if rule_cost < kept_cost - GAIN:
        moves.restore(rule_queues)
        moves.descend(moves.left)
    patience = _patience(problem, calm=moves.at_stake() <= NOTHING_AT_STAKE)
    if patience:
        _ruin_and_recreate(moves, patience)
    if in_force and kept_cost <= rule_cost and moves.cost() > kept_cost * (1 - WORTH_CHANGING):
        moves.restore(kept)


def _patience(problem: PlanProblem, *, calm: bool) -> int:
    """Rounds without a gain after which to stop. Groups of the plan in force were searched for before."""
    planned = sum(len(queue) for queue in problem.current.values())
    fresh = max(0.0, 1 - planned / max(1, len(problem.groups)))
    in_force = 0 if calm else PATIENCE_IN_FORCE
    return int(in_force + (PATIENCE - in_force) * fresh)


def _ruin_and_recreate(moves: Moves, patience: int) -> None:
    """Take groups out and put them back in another order, again and again, and keep the best plan.

    After Schrimpf et al. (2000), with the blinks of Christiaens and Vanden Berghe (2020).
    """
    problem = moves.problem
    groups = {group.id: group for group in problem.groups}
    best, best_cost = moves.save(), moves.cost()
    idle = 0
    while moves.left > 0 and idle < patience:
        idle += 1
        saved, cost = moves.save(), moves.cost()
        removed = _ruin(moves)
        order = moves.random.choice((by_deadline, by_length, _by_work, _by_model, None))
        if order is None:
            moves.random.shuffle(removed)
        else:
            removed.sort(key=lambda group: order(groups[group]))
        for group in removed:
            moves.insert((group,), blink=BLINK)
        new = moves.cost()
        if new < best_cost - GAIN:
            moves.descend(moves.left)
            best, best_cost = moves.save(), moves.cost()
            idle = 0
        elif new > cost * WORSE or new > best_cost * WORST:
            moves.restore(saved)
    moves.restore(best)


def _ruin(moves: Moves) -> list[int]:
    """Take some groups out: mostly a dear one with what stands before it and those like it; or all of some
    short queues; or a stretch of one queue; or any. Returns their ids."""
    random = moves.random
    places = [(queue, position) for queue in moves.queues for position in range(len(queue.tasks))]
    size = min(random.randint(2, MOST_REMOVED), len(places))
    manner = random.random()
    if manner < 0.8:
        added = [queue.trail[p + 1][COST] - queue.trail[p][COST] for queue, p in places]
        at = random.choices(range(len(places)), added)[0]
        queue, position = places[at]
        before = range(at - min(position, size), at)
        chosen = {at, *random.sample(before, min(len(before), size // 2))}
        dear = queue.tasks[position]
        tasks = [queue.tasks[p] for queue, p in places]
        alike = sorted(
            range(len(places)),
            key=lambda k: (
                tasks[k].model != dear.model,
                abs(tasks[k].first_deadline_s - dear.first_deadline_s),
            ),
        )
        while len(chosen) < size:
            chosen.add(alike[int(len(alike) * random.random() ** 2)])
    elif manner < 0.85:
        # Whole queues, as many as are not too long.
        some = random.sample(moves.queues, min(len(moves.queues), random.randint(1, 3)))
        chosen = {k for k, (queue, _) in enumerate(places) if queue in some}
        if not 0 < len(chosen) <= MOST_REPLANNED:
            chosen = set(random.sample(range(len(places)), size))
    elif manner < 0.9:
        at = random.randrange(len(places) - size + 1)
        chosen = set(range(at, at + size))
    else:
        chosen = set(random.sample(range(len(places)), size))
    removed = []
    first: dict[int, int] = {}
    for at in sorted(chosen):
        queue, position = places[at]
        first.setdefault(queue.index, position)
        removed.append(queue.tasks[position].id)
    out = set(removed)
    for index, position in first.items():
        queue = moves.queues[index]
        moves.set(queue, [task for task in queue.tasks if task.id not in out], position)
    return removed


def _by_work(group: WaitingGroup) -> tuple[float | str, ...]:
    service = next(iter(group.service.values()))
    return -group.requests * (service.prefill_s + service.decode_s), group.id


def _by_model(group: WaitingGroup) -> tuple[float | str, ...]:
    return group.model, group.first_deadline_s, group.id


def insertion(
    instances: Sequence[InstanceState],
    queues: Mapping[str, Sequence[WaitingGroup]],
    group: WaitingGroup,
) -> tuple[str, int]:
    """Where one new group costs least: (instance, position). For placement between two plans."""
    best = None
    below = inf
    for instance in instances:
        if instance.kind not in group.service:
            continue
        queue = Queue(instance, 0)
        queue.replace([task(each, instance.kind) for each in queues[instance.id]])
        new = task(group, instance.kind)
        for position in insertion_points(queue.tasks, new):
            if queue.insertion_bound(position, (new,), below) < below:
                rest = [new, *queue.tasks[position:]]
                added = queue.price(position, rest, queue.cost + below) - queue.cost
                if added < below - GAIN:
                    below, best = added, (instance.id, position)
    assert best is not None, f"no instance can serve group {group.id} of model {group.model}"
    return best
