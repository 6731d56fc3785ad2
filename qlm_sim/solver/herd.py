"""SHEPHERD's planner as an integer program: which models each instance serves until the next plan.

Follows HERD (Zhang et al., NSDI '23, section 4.2) in its aim: the worst-off model's capacity over its
demand, the burst that it could bear, is made as large as possible. Chosen here: an instance holds one
model at a time, so one that serves several shares its time among them and pays for their swaps.
"""

from collections.abc import Mapping

SWAP_SHARE = 0.05
"""Share of an instance's time that each model beyond its first costs in swaps."""


def assign_models(
    demand_rps: Mapping[str, float], capacity_rps: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[str, ...]]:
    """Models for every instance.

    ``demand_rps`` by model; ``capacity_rps`` by instance and model: requests per second of an
    instance that serves that model alone. A model without demand is assigned nowhere.
    """
    import pulp  # here, because it takes long to import and most runs do without

    wanted = {
        model: rate
        for model, rate in sorted(demand_rps.items())
        if rate > 0 and any(model in by_model for by_model in capacity_rps.values())
    }
    if not wanted:
        return dict.fromkeys(capacity_rps, ())
    problem = pulp.LpProblem("herd", pulp.LpMaximize)
    burst = problem.add_variable("burst", 0)
    serves: dict[tuple[str, str], pulp.LpVariable] = {}
    share: dict[tuple[str, str], pulp.LpVariable] = {}
    for i, (name, by_model) in enumerate(sorted(capacity_rps.items())):
        for m, model in enumerate(wanted):
            if model in by_model:
                serves[name, model] = problem.add_variable(f"serves_{i}_{m}", cat=pulp.LpBinary)
                share[name, model] = problem.add_variable(f"share_{i}_{m}", 0, 1)
                problem += share[name, model] <= serves[name, model]
        mine = [key for key in serves if key[0] == name]
        if mine:
            problem += (
                pulp.lpSum(share[key] for key in mine) + SWAP_SHARE * pulp.lpSum(serves[key] for key in mine)
                <= 1 + SWAP_SHARE
            )
    for model, rate in wanted.items():
        problem += (
            pulp.lpSum(capacity_rps[key[0]][model] * share[key] for key in share if key[1] == model)
            >= burst * rate
        )
    problem += burst - 1e-4 * pulp.lpSum(serves.values())
    problem.solve(pulp.HiGHS(msg=False, gapRel=0.01, mip_max_nodes=200, threads=1))
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return {name: tuple(m for m in wanted if m in by_model) for name, by_model in capacity_rps.items()}
    return {
        name: tuple(
            model for model in wanted if (name, model) in serves and serves[name, model].value() > 0.5
        )
        for name in capacity_rps
    }
