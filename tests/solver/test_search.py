"""The plan search: valid plans, honest prices, near the optimum, never above the start."""

import numpy as np
import pytest

from qlm_sim.solver.cost import plan_cost
from qlm_sim.solver.moves import MANY_INSTANCES
from qlm_sim.solver.search import WORTH_CHANGING, solve
from qlm_sim.solver.starts import edf_queues


def ids(queues):
    return sorted(g for queue in queues.values() for g in queue)


@pytest.mark.parametrize("seed", range(20))
def test_every_group_stands_on_exactly_one_queue(seed, random_problem):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(1, 40)), int(rng.integers(1, 6)), 4)
    plan = solve(problem, budget=300)
    assert ids(plan.queues) == [group.id for group in problem.groups]


def test_the_price_is_that_of_the_one_cost(random_problem):
    problem = random_problem(np.random.default_rng(1), 20, 3, 3)
    plan = solve(problem)
    assert plan.cost == pytest.approx(plan_cost(problem, plan.queues))


def test_the_same_problem_gives_the_same_plan(random_problem):
    problem = random_problem(np.random.default_rng(2), 30, 4, 3)
    assert solve(problem) == solve(problem)


def test_a_plan_is_near_the_optimum_of_small_problems(random_problem, optimal_cost):
    rng = np.random.default_rng(3)
    gaps = []
    for _ in range(30):
        problem = random_problem(rng, int(rng.integers(2, 6)), int(rng.integers(1, 4)), 3)
        best = optimal_cost(problem)
        cost = solve(problem).cost
        assert cost >= best - 1e-9
        gaps.append((cost - best) / max(best, 0.01))
    assert np.mean(gaps) <= 0.02


@pytest.mark.parametrize("seed", range(10))
def test_the_plan_in_force_is_never_made_worse(seed, random_problem):
    rng = np.random.default_rng(100 + seed)
    problem = random_problem(rng, 12, 3, 3)
    queues = {instance.id: [] for instance in problem.instances}
    for group in problem.groups:
        queues[f"i{rng.integers(3)}"].append(group.id)
    current = {name: tuple(queue) for name, queue in queues.items()}
    started = type(problem)(1, problem.groups, problem.instances, current)
    assert solve(started, budget=500).cost <= plan_cost(problem, current) + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_is_left_only_for_one_that_is_worth_it(seed, random_problem):
    problem = random_problem(np.random.default_rng(seed), 15, 3, 3)
    first = solve(problem)
    again = solve(type(problem)(2, problem.groups, problem.instances, first.queues))
    assert again.queues == first.queues or again.cost <= first.cost * (1 - WORTH_CHANGING)


@pytest.mark.parametrize("budget", [0, 300, 20_000])
@pytest.mark.parametrize("seed", range(6))
def test_no_plan_costs_more_than_earliest_deadline_first(seed, budget, random_problem):
    problem = random_problem(np.random.default_rng(200 + seed), 60, 8, 4)
    assert solve(problem, budget).cost <= plan_cost(problem, edf_queues(problem)) + 1e-9


def test_the_budget_holds_but_for_putting_every_group_somewhere(random_problem):
    """Without a plan in force each is tried at the ends of a few queues, and three plans are priced."""
    problem = random_problem(np.random.default_rng(300), 400, 20, 4)
    for budget in (0, 30_000):
        assert solve(problem, budget).evaluations <= budget + (2 * MANY_INSTANCES + 8) * 400
