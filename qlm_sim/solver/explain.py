"""Why a plan: which groups it moved, what it expects of them, and what leaving them would have cost.

Made from the question and the answer alone, which stand in the event log.
"""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from qlm_sim.core.plan import (
    GroupMove,
    InstanceState,
    Plan,
    PlanExplanation,
    PlanProblem,
    WaitingGroup,
)
from qlm_sim.solver.cost import State, beginning, follow, plan_cost, task


def explain(at_s: float, problem: PlanProblem, plan: Plan) -> PlanExplanation:
    """The answer ``plan`` to ``problem``, taken up at ``at_s`` (seconds since the run's start)."""
    groups = {group.id: group for group in problem.groups}
    before, after = _expected(problem, problem.current, groups), _expected(problem, plan.queues, groups)
    moves = [
        GroupMove(
            group=group_id,
            model=groups[group_id].model,
            slo_class=groups[group_id].slo_class,
            requests=groups[group_id].requests,
            source=before[group_id][0],
            target=after[group_id][0],
            kept_wait_s=before[group_id][1],
            wait_s=after[group_id][1],
            due_s=groups[group_id].last_deadline_s,
        )
        for group_id in _moved(problem, plan)
    ]
    return PlanExplanation(
        at_s=at_s,
        number=plan.number,
        requests=sum(group.requests for group in problem.groups),
        groups=len(groups),
        kept_cost=plan_cost(problem, problem.current),
        cost=plan_cost(problem, plan.queues),
        moves=tuple(moves),
    )


def _expected(
    problem: PlanProblem, queues: Mapping[str, Sequence[int]], groups: Mapping[int, WaitingGroup]
) -> dict[int, tuple[str, float]]:
    """By group: its instance, and the expected seconds until all its first tokens are out."""
    expected = {}
    for instance in problem.instances:
        queue = queues.get(instance.id, ())
        for group_id, wait_s in zip(queue, _waits(instance, [groups[g] for g in queue]), strict=True):
            expected[group_id] = (instance.id, wait_s)
    return expected


def _waits(instance: InstanceState, queue: Sequence[WaitingGroup]) -> list[float]:
    trail: list[State] = []
    tasks = [task(group, instance.kind) for group in queue]
    follow(beginning(instance), tasks, instance.leave_s, instance.swap_s, trail=trail)
    return [state[0] for state in trail]


def _moved(problem: PlanProblem, plan: Plan) -> list[int]:
    """Groups on another queue than before, or out of the order that most of their queue kept."""
    moved = []
    for instance in problem.instances:
        old = problem.current.get(instance.id, ())
        new = plan.queues.get(instance.id, ())
        if old == new:
            continue
        kept = {
            group
            for block in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
            for group in new[block.b : block.b + block.size]
        }
        moved += [group for group in new if group not in kept]
    return moved
