"""The paper's integer program: valid plans, priced by the one cost, and told from proofs."""

import numpy as np
import pytest

from qlm_sim.solver.cost import plan_cost
from qlm_sim.solver.milp import places, solve_milp
from qlm_sim.solver.mip import Backend, Outcome, run
from qlm_sim.solver.optimum import solve_to_optimality
from qlm_sim.solver.search import solve
from qlm_sim.solver.solvers import MOST_PLACES, SOLVERS, PlanSolver, milp_plan
from qlm_sim.solver.starts import edf_queues


def problems(random_problem, count, groups=4, instances=2):
    rng = np.random.default_rng(900)
    return [random_problem(rng, groups, instances, 2) for _ in range(count)]


@pytest.mark.parametrize("backend", list(Backend))
def test_a_plan_holds_every_group_once_and_is_priced_by_the_one_cost(backend, random_problem):
    for problem in problems(random_problem, 3, groups=3):
        answer = solve_milp(problem, backend)
        assert answer.outcome is Outcome.OPTIMAL
        queues = answer.plan.queues
        assert sorted(g for queue in queues.values() for g in queue) == [0, 1, 2]
        assert answer.plan.cost == pytest.approx(plan_cost(problem, queues))


def test_no_plan_costs_more_than_earliest_deadline_first_or_less_than_the_optimum(random_problem):
    for problem in problems(random_problem, 5, groups=3):
        plan = milp_plan(problem, Backend.HIGHS)
        assert plan.cost <= plan_cost(problem, edf_queues(problem)) + 1e-9
        assert plan.cost >= solve_to_optimality(problem).cost - 1e-6


def test_what_is_met_in_the_optimum_is_met_in_the_program(random_problem):
    """Its optimum is not that of cost, but most often near it."""
    close = 0
    for problem in problems(random_problem, 6):
        best = solve_to_optimality(problem).cost
        close += solve_milp(problem).plan.cost <= 1.1 * best + 0.02
    assert close >= 4


def test_both_backends_agree_on_the_objective(random_problem):
    for problem in problems(random_problem, 3, groups=3):
        first, second = solve_milp(problem, Backend.HIGHS), solve_milp(problem, Backend.CBC)
        assert first.objective == pytest.approx(second.objective, abs=3e-3)


def test_the_same_problem_gives_the_same_plan(random_problem):
    (problem,) = problems(random_problem, 1)
    assert solve_milp(problem) == solve_milp(problem)


@pytest.mark.parametrize("backend", list(Backend))
def test_running_out_of_nodes_is_no_proof(backend):
    """LpStatus says "Optimal" of a solution that is merely the best so far."""
    assert run(hard_knapsack(), backend, nodes=1, gap=0.0) is Outcome.FEASIBLE


@pytest.mark.parametrize("backend", list(Backend))
def test_no_solution_is_no_perfect_one(backend):
    """With no solution at all the objective reads 0, which looks perfect."""
    problem = hard_knapsack(infeasible=True)
    assert run(problem, backend, nodes=1, gap=0.0) is Outcome.NONE


def hard_knapsack(infeasible=False):
    """Many items of nearly one price per weight, in five sacks: no root node proves it."""
    import pulp

    rng = np.random.default_rng(5)
    problem = pulp.LpProblem("knapsacks", pulp.LpMaximize)
    weights = rng.integers(1000, 2000, (5, 40))
    take = [problem.add_variable(f"x{k}", 0, 1, pulp.LpBinary) for k in range(40)]
    for row in weights:
        problem += pulp.lpSum(int(w) * x for w, x in zip(row, take, strict=True)) <= int(row.sum() // 2)
    if infeasible:
        problem += pulp.lpSum(take) >= 41
    prices = weights.sum(axis=0) + rng.integers(0, 50, 40)
    problem.setObjective(pulp.lpSum(int(p) * x for p, x in zip(prices, take, strict=True)))
    return problem


def test_what_is_too_large_for_the_program_is_searched_and_counted(random_problem):
    rng = np.random.default_rng(901)
    small, large = random_problem(rng, 3, 1, 2), random_problem(rng, 12, 3, 2)
    assert places(small) == 9
    assert places(large) > MOST_PLACES
    solver = PlanSolver("milp")
    solver(small)
    assert (solver.plans, solver.fallbacks) == (1, 0)
    assert solver(large) == solve(large)
    assert (solver.plans, solver.fallbacks) == (2, 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_by_name_serves_all_groups(name, random_problem):
    (problem,) = problems(random_problem, 1, groups=3)
    plan = PlanSolver(name)(problem)
    assert sorted(g for queue in plan.queues.values() for g in queue) == [0, 1, 2]
