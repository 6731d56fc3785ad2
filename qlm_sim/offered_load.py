"""How much of a cluster's capacity a workload asks for, before anything is run.

The estimate fills every batch, spreads requests ideally and swaps for free: a run needs more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from qlm_sim.core.types import InstanceSpec, ModelOnInstance
from qlm_sim.estimator.lengths import LengthStatistics
from qlm_sim.estimator.service import group_service
from qlm_sim.metrics.summary import Summary
from qlm_sim.solver.load import least_load
from qlm_sim.workload.workload import Workload


@dataclass(frozen=True, slots=True)
class Demand:
    """What requests ask for one model."""

    rate_rps: float
    prompt_tokens: float
    """Mean."""
    output: LengthStatistics


def demands(workload: Workload) -> dict[str, Demand]:
    """By model, of those that are asked for; rates over the time from the first arrival to the last."""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0]) or 1.0
    found = {}
    for index, name in enumerate(workload.models):
        rows = workload.model_index == index
        count = int(rows.sum())
        if count:
            output = workload.output_tokens[rows].astype(float)
            lengths = LengthStatistics(count, float(output.sum()), float((output**2).sum()))
            prompt = float(workload.prompt_tokens[rows].mean())
            found[name] = Demand(count / span_s, prompt, lengths)
    return found


def capacity_rps(deployed: ModelOnInstance, demand: Demand) -> float:
    """Requests per second of an instance that serves this model alone, its batch always full."""
    service = group_service(deployed, demand.prompt_tokens, demand.output)
    return 1 / (service.prefill_s + service.decode_s)


def offered_load(demand: Mapping[str, Demand], specs: Sequence[InstanceSpec]) -> float:
    """Work that arrives over what the instances can do; above 1 they cannot keep up."""
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


def told_of_load(summary: Summary, load: float, requests: int) -> Summary:
    """The summary with ``offered_load``, and with the verdict that it gives where the run was too short to
    show it.

    The load is above 1 where chance does not explain it: a number of Poisson arrivals has a standard
    deviation of 1 / sqrt(requests) of it, taken twice. What admission refuses is no part of what is served.
    """
    summary = summary | {"offered_load": load}
    if summary["saturated"] or summary["refused"] or load <= 1 + 2 / sqrt(requests):
        return summary
    return summary | {
        "saturated": True,
        "saturation": f"Saturated: the requests ask for {load:.0%} of what the cluster can serve, as "
        "estimated; in a longer run latencies would be longer.",
    }
