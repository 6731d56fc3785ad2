"""The instances of a scenario's cluster: what each may serve, and which model it starts with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qlm_sim.config.scenario import ClusterConfig, Scenario
from qlm_sim.core.types import InstanceSpec, ModelOnInstance
from qlm_sim.errors import InputError
from qlm_sim.models.deployment import deploy
from qlm_sim.models.hardware import load_gpu
from qlm_sim.models.specs import ModelSpec, load_model

GIB = 2**30


def instances(scenario: Scenario) -> list[InstanceSpec]:
    """Every instance, named "<gpu>-<number>". Raises InputError where a model does not fit.

    At the start an instance holds the model that its group deals it (``resident``), and host memory
    as many of its other models as it has room for, the most wanted first.
    """
    shares = model_shares(scenario)
    dealt = dict.fromkeys(shares, 0)
    numbers: dict[str, int] = {}
    specs = []
    for position, group in enumerate(scenario.cluster):
        deployed = _deployed(scenario, group, f"cluster[{position}]")
        wanted = sorted(group.models, key=lambda model: -shares.get(model, 0.0))
        for index in range(group.count):
            if group.resident:
                resident = group.resident[index % len(group.resident)]
            else:
                resident = next_resident(wanted, shares, dealt)
            dealt[resident] = dealt.get(resident, 0) + 1
            gpu = load_gpu(group.gpu).name.lower()
            number = numbers[gpu] = numbers.get(gpu, -1) + 1
            host_bytes = int(group.host_memory_gib * GIB)
            specs.append(
                InstanceSpec(
                    id=f"{gpu}-{number}",
                    models=deployed,
                    resident=resident,
                    host_bytes=host_bytes,
                    host_models=host_models(wanted, resident, deployed, host_bytes),
                )
            )
    return specs


def scenario_model(scenario: Scenario, name: str) -> ModelSpec:
    """The model of that name: one of the scenario's own, or a shipped one."""
    if name in scenario.models:
        return replace(load_model(scenario.models[name].config), name=name)
    return load_model(name)


def _deployed(scenario: Scenario, group: ClusterConfig, at: str) -> dict[str, ModelOnInstance]:
    try:
        gpu = load_gpu(group.gpu)
        return {
            name: deploy(
                scenario_model(scenario, name),
                gpu,
                group.tp,
                scenario.engine,
                engine=group.engine,
                storage_bytes_per_s=group.storage_gb_per_s * 1e9,
            )
            for name in group.models
        }
    except InputError as error:
        raise InputError(f"{at}: {error}") from None


def model_shares(scenario: Scenario) -> dict[str, float]:
    """The share of requests that ask for each model, 1 in all."""
    total = sum(entry.share for entry in scenario.mix)
    shares: dict[str, float] = {}
    for entry in scenario.mix:
        shares[entry.model] = shares.get(entry.model, 0.0) + entry.share / total
    return shares


def next_resident(models: Sequence[str], shares: Mapping[str, float], dealt: Mapping[str, int]) -> str:
    """The model whose share is least served by what is dealt (Sainte-Laguë); the first of equals."""
    return max(models, key=lambda model: shares.get(model, 0.0) / (2 * dealt.get(model, 0) + 1))


def host_models(
    wanted: Sequence[str], resident: str, deployed: Mapping[str, ModelOnInstance], host_bytes: int
) -> tuple[str, ...]:
    """Models whose weights host memory has room for, the resident and the most wanted last (latest used)."""
    room = host_bytes
    held = []
    for model in dict.fromkeys((resident, *wanted)):
        weight_bytes = deployed[model].weight_bytes
        if weight_bytes <= room:
            room -= weight_bytes
            held.append(model)
    return tuple(reversed(held))
