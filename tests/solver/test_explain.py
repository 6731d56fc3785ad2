"""An explanation names what moved, and prices both plans by the one cost."""

import numpy as np
import pytest

from qlm_sim.core.plan import Plan
from qlm_sim.solver.cost import plan_cost
from qlm_sim.solver.explain import explain
from qlm_sim.solver.search import solve


def in_force(problem, queues):
    return type(problem)(problem.number, problem.groups, problem.instances, queues)


def test_a_plan_that_keeps_the_order_moved_nothing(random_problem):
    problem = random_problem(np.random.default_rng(0), 10, 3, 3)
    plan = solve(problem)
    explained = explain(5.0, in_force(problem, plan.queues), plan)
    assert explained.moves == ()
    assert explained.saved == pytest.approx(0.0)


def test_one_group_that_changes_queues_is_the_only_move(random_problem):
    problem = random_problem(np.random.default_rng(1), 8, 2, 2)
    before = {"i0": tuple(range(8)), "i1": ()}
    after = {"i0": (0, 1, 2, 4, 5, 6, 7), "i1": (3,)}
    explained = explain(5.0, in_force(problem, before), Plan(1, after, 0.0, 0))
    (move,) = explained.moves
    assert (move.group, move.source, move.target) == (3, "i0", "i1")
    assert move.requests == problem.groups[3].requests
    assert explained.kept_cost == pytest.approx(plan_cost(problem, before))
    assert explained.cost == pytest.approx(plan_cost(problem, after))


def test_a_group_put_first_is_named_and_not_those_behind_it(random_problem):
    problem = random_problem(np.random.default_rng(2), 5, 1, 2)
    explained = explain(
        0.0, in_force(problem, {"i0": (0, 1, 2, 3, 4)}), Plan(1, {"i0": (4, 0, 1, 2, 3)}, 0, 0)
    )
    (move,) = explained.moves
    assert move.group == 4
    assert move.wait_s < move.kept_wait_s
