"""How much of a cluster's capacity a workload asks for, and what that says of a run.

The estimate fills every batch, spreads requests ideally, swaps for free and finds no prefixes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

from qlm_sim.core.types import InstanceSpec, ModelOnInstance
from qlm_sim.estimator.lengths import LengthStatistics
from qlm_sim.estimator.service import group_service
from qlm_sim.metrics.run import PolicyRun
from qlm_sim.metrics.saturation import growing_presence
from qlm_sim.solver.load import least_load
from qlm_sim.workload.workload import Workload

LEAST_REQUESTS = 20
"""Fewer may just have come."""
NEAR_CAPACITY = 0.85


@dataclass(frozen=True, slots=True)
class Demand:
    """What requests ask for one model."""

    rate_rps: float
    prompt_tokens: float
    """Mean."""
    output: LengthStatistics


def demands(workload: Workload) -> dict[str, Demand]:
    """By model, of those that are asked for. n requests have n - 1 intervals between them; where these are 0,
    rates are infinite."""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0]) if len(workload) else 0.0
    intervals_s = span_s * len(workload) / (len(workload) - 1) if span_s else 0.0
    found = {}
    for index, name in enumerate(workload.models):
        rows = workload.model_index == index
        count = int(rows.sum())
        if count:
            output = workload.output_tokens[rows].astype(float)
            lengths = LengthStatistics(count, float(output.sum()), float((output**2).sum()))
            prompt = float(workload.prompt_tokens[rows].mean())
            found[name] = Demand(count / intervals_s if intervals_s else inf, prompt, lengths)
    return found


def capacity_rps(deployed: ModelOnInstance, demand: Demand) -> float:
    """Requests per second of an instance that serves this model alone, its batch always full."""
    service = group_service(deployed, demand.prompt_tokens, demand.output)
    return 1 / (service.prefill_s + service.decode_s)


def offered_load(demand: Mapping[str, Demand], specs: Sequence[InstanceSpec]) -> float | None:
    """Work that arrives over what the instances can do; above 1 they cannot keep up. None where the requests
    are too few, or come too much at once, to have a rate."""
    few = sum(each.output.count for each in demand.values()) < LEAST_REQUESTS
    if few or any(each.rate_rps == inf for each in demand.values()):
        return None
    kinds: dict[tuple[int, ...], InstanceSpec] = {}
    counts: dict[str, int] = {}
    for spec in specs:  # instances of one kind share what their models are there
        first = kinds.setdefault(tuple(map(id, spec.models.values())), spec)
        counts[first.id] = counts.get(first.id, 0) + 1
    return least_load(
        {name: each.rate_rps for name, each in demand.items()},
        {
            spec.id: {
                name: capacity_rps(model, demand[name])
                for name, model in spec.models.items()
                if name in demand
            }
            for spec in kinds.values()
        },
        counts,
    )


def with_offered_load(run: PolicyRun, load: float | None) -> PolicyRun:
    """The run with ``offered_load`` in its summary, and with the verdict that it gives where the run was too
    short to show it.

    The load is above 1 where chance does not explain it: a number of Poisson arrivals has a standard
    deviation of 1 / sqrt(requests) of it, taken twice. What admission refuses is no part of what is served.
    """
    summary = run.summary | {"offered_load": load}
    requests = len(run.requests)  # those that came before the run was stopped
    if load is not None and requests and not summary["saturated"] and not summary["refused"]:
        grounds = None
        if load > 1 + 2 / sqrt(requests):
            grounds = f"the requests ask for {load:.0%} of what the cluster can serve, as estimated"
        elif load > NEAR_CAPACITY and (course := growing_presence(run.requests)):
            grounds = f"the requests that wait or run still grew in number when arrivals ended ({course})"
        if grounds is not None:
            verdict = f"Saturated: {grounds}; in a longer run latencies would be longer."
            summary |= {"saturated": True, "saturation": verdict}
    return replace(run, summary=summary)
