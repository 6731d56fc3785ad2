"""Random planning problems, and the exact answer to small ones."""

from collections.abc import Callable
from itertools import combinations, permutations, product

import numpy as np
import pytest

from qlm_sim.core.plan import GroupService, InstanceState, PlanProblem, WaitingGroup
from qlm_sim.solver.cost import queue_cost


@pytest.fixture
def random_problem() -> Callable[..., PlanProblem]:
    def make(rng: np.random.Generator, groups: int, instances: int, models: int) -> PlanProblem:
        names = [f"m{k}" for k in range(models)]
        kinds = ["k0", "k1"][: int(rng.integers(1, 3))]
        service = {
            (kind, model): GroupService(
                prefill_s=float(rng.uniform(0.02, 0.3)),
                decode_s=(decode_s := float(rng.uniform(0.05, 0.5))),
                decode_sd_s=0.9 * decode_s,
                batch=float(rng.uniform(20, 100)),
            )
            for kind in kinds
            for model in names
        }
        waiting = []
        for number in range(groups):
            model = names[int(rng.integers(models))]
            first = float(rng.choice([rng.uniform(-5, 20), rng.uniform(0, 60), 3600]))
            waiting.append(
                WaitingGroup(
                    id=number,
                    model=model,
                    slo_class="any",
                    requests=int(rng.integers(1, 80)),
                    weight=float(rng.choice([1, 1, 2])),
                    decided=first < 0,
                    first_deadline_s=first,
                    last_deadline_s=first + float(rng.uniform(0, 10)),
                    service={kind: service[kind, model] for kind in kinds},
                )
            )
        states = [
            InstanceState(
                id=f"i{number}",
                kind=str(rng.choice(kinds)),
                model=names[int(rng.integers(models))],
                ready_s=0.0,
                free=float(rng.uniform()),
                running=int(rng.integers(0, 50)),
                leave_s=float(rng.uniform(0.05, 0.5)),
                swap_s={model: float(rng.uniform(0.5, 3)) for model in names},
                running_s=float(rng.uniform(0, 10)),
            )
            for number in range(instances)
        ]
        return PlanProblem(1, tuple(waiting), tuple(states), {state.id: () for state in states})

    return make


@pytest.fixture
def optimal_cost() -> Callable[[PlanProblem], float]:
    """Cost of the best plan, by trying every order of every subset on every instance."""

    def search(problem: PlanProblem) -> float:
        groups = problem.groups
        everyone = range(len(groups))
        best_order = [
            {
                frozenset(chosen): min(
                    queue_cost(instance, [groups[g] for g in order]) for order in permutations(chosen)
                )
                for size in range(len(groups) + 1)
                for chosen in combinations(everyone, size)
            }
            for instance in problem.instances
        ]
        return min(
            sum(
                costs[frozenset(g for g in everyone if homes[g] == index)]
                for index, costs in enumerate(best_order)
            )
            for homes in product(range(len(problem.instances)), repeat=len(groups))
        )

    return search
