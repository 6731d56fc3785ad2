"""How loaded a cluster is at best: the least share of its time that can serve what arrives.

A linear program over fluid rates: swaps cost nothing in it, so a real scheduler needs more.
"""

from collections.abc import Mapping


def least_load(
    demand_rps: Mapping[str, float],
    capacity_rps: Mapping[str, Mapping[str, float]],
    counts: Mapping[str, int],
) -> float:
    """The smallest load of the busiest kind of instance; above 1 the cluster cannot keep up.

    ``demand_rps`` by model; ``capacity_rps`` by kind and model: requests per second of one instance that
    serves that model alone; ``counts``: instances of each kind. Every model has a kind that serves it.
    """
    if len(capacity_rps) == 1:
        ((kind, by_model),) = capacity_rps.items()
        return sum(rate / by_model[model] for model, rate in demand_rps.items()) / counts[kind]
    import pulp  # here, because it takes long to import and most runs do without

    problem = pulp.LpProblem("load", pulp.LpMinimize)
    load = problem.add_variable("load", 0)
    served = {
        (kind, model): problem.add_variable(f"served_{k}_{m}", 0)
        for k, (kind, by_model) in enumerate(capacity_rps.items())
        for m, model in enumerate(by_model)
    }
    problem += load
    for kind, by_model in capacity_rps.items():
        busy = pulp.lpSum(served[kind, model] / capacity for model, capacity in by_model.items())
        problem += busy <= counts[kind] * load
    for model, rate in demand_rps.items():
        problem += pulp.lpSum(rps for (_, name), rps in served.items() if name == model) >= rate
    problem.solve(pulp.HiGHS(msg=False, threads=1))
    assert problem.sol_status == pulp.LpSolutionOptimal, "a model without an instance"
    return float(load.value())
