"""The exact answer to small problems: every order of every subset of groups on every instance.

An oracle for tests and experiments. Time grows as the factorial of the number of groups: eight take a
fraction of a second, ten a minute.
"""

from collections.abc import Mapping

from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.solver.cost import State, Task, beginning, follow, task


def solve_exhaustively(problem: PlanProblem) -> Plan:
    """The plan of least cost."""
    size = len(problem.groups)
    everyone = (1 << size) - 1
    evaluations = 0
    best: dict[int, float] = {0: 0.0}
    """By set of groups, as bits: least cost of serving them on the instances seen so far."""
    chosen: list[tuple[str, dict[int, tuple[float, tuple[int, ...]]], dict[int, int]]] = []
    for instance in problem.instances:
        tasks = {
            1 << index: task(group, instance.kind)
            for index, group in enumerate(problem.groups)
            if instance.kind in group.service
        }
        orders: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        evaluations += _orders(tasks, beginning(instance), instance.leave_s, instance.swap_s, 0, (), orders)
        joined: dict[int, float] = {}
        own: dict[int, int] = {}
        for served, cost in best.items():
            rest = everyone & ~served
            subset = rest
            while True:
                if subset in orders:
                    total = cost + orders[subset][0]
                    if total < joined.get(served | subset, float("inf")):
                        joined[served | subset] = total
                        own[served | subset] = subset
                if not subset:
                    break
                subset = (subset - 1) & rest
        best = joined
        chosen.append((instance.id, orders, own))
    queues: dict[str, tuple[int, ...]] = {}
    left = everyone
    for name, orders, own in reversed(chosen):
        queues[name] = orders[own[left]][1]
        left &= ~own[left]
    return Plan(problem.number, queues, best[everyone], evaluations)


def _orders(
    tasks: dict[int, Task],
    state: State,
    leave_s: float,
    swap_s: Mapping[str, float],
    served: int,
    order: tuple[int, ...],
    orders: dict[int, tuple[float, tuple[int, ...]]],
) -> int:
    """Least cost and its order for every set of tasks that goes on from ``order``; returns the work done."""
    work = 0
    for bit, each in tasks.items():
        if served & bit:
            continue
        trail: list[State] = []
        cost = follow(state, (each,), leave_s, swap_s, trail=trail)
        longer = (*order, each.id)
        known = orders.get(served | bit)
        if known is None or cost < known[0]:
            orders[served | bit] = (cost, longer)
        work += 1 + _orders(tasks, trail[0], leave_s, swap_s, served | bit, longer, orders)
    return work
