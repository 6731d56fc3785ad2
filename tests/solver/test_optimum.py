"""The proved optimum: that of exhaustive search, with an order that costs what is said."""

import numpy as np
import pytest

from qlm_sim.solver.cost import plan_cost
from qlm_sim.solver.exhaustive import solve_exhaustively
from qlm_sim.solver.optimum import solve_to_optimality
from qlm_sim.solver.search import solve


@pytest.mark.parametrize("seed", range(12))
def test_exhaustive_search_is_never_better(seed, random_problem):
    rng = np.random.default_rng(500 + seed)
    problem = random_problem(rng, int(rng.integers(1, 8)), int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    exhaustive, proved = solve_exhaustively(problem), solve_to_optimality(problem)
    assert proved.cost == pytest.approx(exhaustive.cost, abs=1e-6)
    assert proved.cost == pytest.approx(plan_cost(problem, proved.queues))
    assert sorted(g for queue in proved.queues.values() for g in queue) == [g.id for g in problem.groups]


def test_exhaustive_search_tries_every_order_of_every_subset(random_problem, optimal_cost):
    rng = np.random.default_rng(600)
    for _ in range(5):
        problem = random_problem(rng, 4, 2, 2)
        assert solve_exhaustively(problem).cost == pytest.approx(optimal_cost(problem))


@pytest.mark.parametrize("seed", range(3))
def test_search_is_close_to_the_proved_optimum_of_ten_groups(seed, random_problem):
    problem = random_problem(np.random.default_rng(700 + seed), 10, 3, 3)
    best = solve_to_optimality(problem).cost
    assert best - 1e-6 <= solve(problem).cost <= 1.05 * best
