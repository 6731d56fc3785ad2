"""Queues of a plan under search, with the state before each position, so that a change is priced from
where it happens and not from the start.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from qlm_sim.core.plan import InstanceState
from qlm_sim.solver.cost import WAIT_PER_S2, State, Task, beginning, follow

# Places in a State.
CLOCK_S: Final = 0
LOADED: Final = 2
RUNNING: Final = 4
COST: Final = 5
WAITING: Final = 6
UNDONE_S: Final = 7
RUNNING_S: Final = 8

EVERY_POSITION = 8
"""Up to this many groups, every position of a queue is worth trying."""


Saved = tuple[list[Task], list[State], float]


class Queue:
    """The order of groups on one instance."""

    __slots__ = ("cost", "index", "instance", "kind", "leave_s", "swap_s", "tasks", "trail")

    def __init__(self, instance: InstanceState, index: int) -> None:
        self.instance = instance
        self.index = index
        self.kind = instance.kind
        self.leave_s = instance.leave_s
        self.swap_s = instance.swap_s
        self.tasks: list[Task] = []
        self.trail: list[State] = [beginning(instance)]
        """The state before each task, and after the last."""
        self.cost = 0.0

    def replace(self, tasks: list[Task], start: int = 0) -> None:
        """Serve ``tasks`` instead; the first ``start`` of them are those of before."""
        if not tasks and not self.tasks:
            return
        self.tasks = tasks
        self.trail = self.trail[: start + 1]
        follow(self.trail[start], tasks[start:], self.leave_s, self.swap_s, trail=self.trail)
        self.cost = self.trail[-1][COST]

    def save(self) -> Saved:
        """What ``restore`` needs to come back to the queue as it is now."""
        return self.tasks, self.trail, self.cost

    def restore(self, saved: Saved) -> None:
        self.tasks, self.trail, self.cost = saved

    def price(self, start: int, tasks: Sequence[Task], limit: float) -> float:
        """What the queue would cost with ``tasks`` from position ``start`` on; inf above ``limit``."""
        return follow(self.trail[start], tasks, self.leave_s, self.swap_s, limit)

    def at_stake(self) -> float:
        """Cost apart from waiting: what is missed, late or spent on swaps."""
        return self.cost - self.trail[-1][WAITING]

    def insertion_bound(self, position: int, block: Sequence[Task], limit: float) -> float:
        """What inserting ``block`` there adds, were nobody behind late because of it; inf above ``limit``."""
        before = self.trail[position]
        after: list[State] = []
        own = follow(before, block, self.leave_s, self.swap_s, before[COST] + limit, after) - before[COST]
        if own > limit:
            return own
        behind_s = self.trail[-1][CLOCK_S] - before[CLOCK_S]
        if behind_s:
            following = self.tasks[position].model
            delay_s = after[-1][CLOCK_S] - before[CLOCK_S]
            if following != block[-1].model:
                delay_s += self.leave_s + self.swap_s[following]
            if following != before[LOADED]:
                delay_s -= self.leave_s + self.swap_s[following]
            own += 2 * WAIT_PER_S2 * delay_s * behind_s
        return own


def visit_starts(tasks: Sequence[Task]) -> list[int]:
    """Positions at which the model changes; a visit is what is served between two swaps."""
    models = [task.model for task in tasks]
    return [p for p, model in enumerate(models) if p == 0 or model != models[p - 1]]


def insertion_points(tasks: Sequence[Task], task: Task) -> list[int]:
    """Positions worth trying, the one to keep at equal cost first.

    In deadline order in each visit to the task's model, at the end of such a visit, at the end of the
    queue, and before each visit; of a short queue every position.
    """
    if not tasks:
        return [0]
    model, first_s = task.model, task.first_deadline_s
    count = len(tasks)
    points: list[int] = []
    starts = visit_starts(tasks)
    for start, end in pairwise((*starts, count)):
        if tasks[start].model == model:
            at = start
            while at < end and tasks[at].first_deadline_s <= first_s:
                at += 1
            points += at, end
    points.append(count)
    points += starts if count > EVERY_POSITION else range(count)
    return list(dict.fromkeys(points))
