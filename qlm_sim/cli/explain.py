"""What a scenario asks of its cluster, in tables: requests, memory, and load against capacity."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from qlm_sim.cli.tables import plain_table
from qlm_sim.config import Scenario
from qlm_sim.config.instances import GIB, instances, scenario_model
from qlm_sim.config.scenario import ClusterConfig
from qlm_sim.core.types import InstanceSpec
from qlm_sim.models.hardware import load_gpu
from qlm_sim.models.step_time import kv_bytes_per_gpu_token
from qlm_sim.offered_load import NEAR_CAPACITY, Demand, capacity_rps, demands, offered_load
from qlm_sim.replay import scenario_trace, scenario_workload
from qlm_sim.report.comparison import number, percent, seconds
from qlm_sim.workload.workload import Workload


def explain(scenario: Scenario, console: Console) -> None:
    """Print the tables. Raises InputError where the scenario cannot run."""
    specs = instances(scenario)
    notes: list[str] = []
    workload, more = scenario_workload(scenario, specs, scenario_trace(scenario, notes.append))
    demand = demands(workload)
    first = _first_of_each_group(scenario, specs)
    console.print(f"{scenario.name}: {scenario.description}" if scenario.description else scenario.name)
    console.print(_requests(scenario, workload))
    console.print(_classes(workload))
    console.print(_instances(scenario, specs))
    for group, spec in zip(scenario.cluster, first, strict=True):
        console.print(_models(scenario, group, spec, demand))
    console.print(_load(specs, demand))
    for note in notes + more:
        console.print(f"note: {note}")


def _first_of_each_group(scenario: Scenario, specs: Sequence[InstanceSpec]) -> list[InstanceSpec]:
    starts = np.cumsum([0] + [group.count for group in scenario.cluster[:-1]])
    return [specs[start] for start in starts]


def _requests(scenario: Scenario, workload: Workload) -> str:
    span_s = float(workload.arrival_s[-1])
    rate = f"{number(len(workload) / span_s)}/s over {seconds(span_s)}" if span_s else "all at once"
    prompt, output = workload.prompt_tokens, workload.output_tokens
    return (
        f"{len(workload):,} requests of {scenario.workload.trace}, arrivals {scenario.workload.arrivals}, "
        f"{rate}; prompts {number(prompt.mean())} tokens "
        f"in the mean, {number(float(np.percentile(prompt, 99)))} at p99, outputs {number(output.mean())} "
        f"and {number(float(np.percentile(output, 99)))}"
    )


def _classes(workload: Workload) -> Table:
    table = plain_table("SLO class", "requests", "TTFT", "TPOT", "E2E", "weight")
    for index, slo in enumerate(workload.slo_classes):
        share = float((workload.slo_index == index).mean())
        targets = (seconds(target) for target in (slo.ttft_s, slo.tpot_s, slo.e2e_s))
        table.add_row(slo.name, percent(share), *targets, f"{slo.weight:g}")
    return table


def _instances(scenario: Scenario, specs: Sequence[InstanceSpec]) -> Table:
    table = plain_table("instance", "GPUs", "loaded at the start", "host memory", "models in it")
    groups = [group for group in scenario.cluster for _ in range(group.count)]
    for spec, group in zip(specs, groups, strict=True):
        table.add_row(
            spec.id,
            f"{group.tp} x {load_gpu(group.gpu).name}",
            spec.resident or "",
            f"{group.host_memory_gib:g} GiB",
            f"{len(spec.host_models)} of {len(spec.models)}",
        )
    return table


def _models(
    scenario: Scenario, group: ClusterConfig, spec: InstanceSpec, demand: Mapping[str, Demand]
) -> Table:
    """What each model leaves of a GPU's memory, and how fast it is served and swapped in."""
    gpu = load_gpu(group.gpu)
    utilization = scenario.engine.gpu_memory_utilization
    budget = utilization * gpu.memory_bytes.value / GIB
    table = plain_table(
        *("model", "weights", "KV", "rest", "KV tokens", "longest", "req/s", "swap in", "load"),
        title=f"{group.tp} x {gpu.name}: each GPU's {utilization:g} x {gpu.memory_bytes.value / GIB:.1f} "
        f"= {budget:.1f} GiB hold weights + KV cache + rest",
    )
    for name, deployed in spec.models.items():
        model = scenario_model(scenario, name)
        weights = model.weight_bytes / group.tp / GIB
        kv = deployed.kv_capacity_tokens * kv_bytes_per_gpu_token(model, group.tp) / GIB
        table.add_row(
            name,
            f"{weights:.1f}",
            f"{kv:.1f}",
            f"{budget - weights - kv:.1f}",
            f"{deployed.kv_capacity_tokens:,}",
            f"{deployed.max_model_len:,}",
            number(capacity_rps(deployed, demand[name])) if name in demand else "",
            seconds(deployed.swap_in_s),
            seconds(deployed.load_s),
        )
    return table


def _load(specs: Sequence[InstanceSpec], demand: Mapping[str, Demand]) -> str:
    load = offered_load(demand, specs)
    if load is None:
        return "Offered load: the requests are too few, or come too much at once, to have a rate."
    verdict = (
        "the cluster cannot keep up, requests pile up until arrivals end"
        if load > 1
        else "near saturation, where small differences decide"
        if load > NEAR_CAPACITY
        else "it can keep up"
    )
    return (
        f"Offered load: {load * 100:.0f}% of the estimated capacity ({verdict}). The estimate fills every "
        "batch, spreads requests ideally and swaps for free: a run needs more."
    )
