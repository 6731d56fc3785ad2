"""What no single key can tell: names that must match between tables, and settings that exclude each other."""

from collections.abc import Sequence

from qlm_sim.config.instances import scenario_model
from qlm_sim.config.scenario import Scenario
from qlm_sim.config.table import Source, did_you_mean
from qlm_sim.core.types import Lso
from qlm_sim.errors import InputError
from qlm_sim.models.engines import load_engine
from qlm_sim.models.hardware import load_gpu
from qlm_sim.policies import POLICIES
from qlm_sim.solver.solvers import SOLVERS
from qlm_sim.workload.arrivals import parse_arrivals
from qlm_sim.workload.readers import FORMATS


def check_scenario(scenario: Scenario, source: Source) -> None:
    """Raises InputError at the first contradiction, naming its key."""
    _check_names(scenario, source)
    _check_cluster(scenario, source)
    _check_mix(scenario, source)
    _check_workload(scenario, source)
    engine = scenario.engine
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise source.refuse(
            "engine.max_num_batched_tokens",
            engine.max_num_batched_tokens,
            f"at least max_num_seqs ({engine.max_num_seqs}), as vLLM demands",
        )
    _one_of(source, "engine.scheduling_policy", engine.scheduling_policy, ["fcfs", "priority"])
    _all_of(source, "scheduler.policies", scenario.scheduler.policies or (), list(POLICIES))
    _all_of(source, "scheduler.without", scenario.scheduler.without, [str(lso) for lso in Lso])
    _one_of(source, "scheduler.solver", scenario.scheduler.solver, list(SOLVERS))


def _check_names(scenario: Scenario, source: Source) -> None:
    name = scenario.name
    if not name or name.startswith(".") or not all(each.isalnum() or each in "._-" for each in name):
        raise source.refuse(
            "name", name, "letters, digits, '-', '_' and '.', as it names the result directory"
        )
    for key in ("cluster", "mix", "slo"):
        if not getattr(scenario, key):
            raise InputError(f"{source.place(key)}: empty, expected at least one [[{key}]]")
    _no_twins(source, "slo", [slo.name for slo in scenario.slo])


def _check_mix(scenario: Scenario, source: Source) -> None:
    classes = [slo.name for slo in scenario.slo]
    served = list(dict.fromkeys(model for group in scenario.cluster for model in group.models))
    for i, entry in enumerate(scenario.mix):
        _one_of(source, f"mix[{i}].slo_class", entry.slo_class, classes)
        if entry.arrivals is not None:
            _check_arrivals(source, f"mix[{i}].arrivals", entry.arrivals)
        if entry.model not in served:
            raise InputError(
                f"{source.place(f'mix[{i}].model')}: found {entry.model!r}, which no [[cluster]] serves; "
                f"{did_you_mean(entry.model, served)}"
            )
        if entry.prompt_tokens and entry.prompt_tokens[0] > entry.prompt_tokens[1]:
            raise source.refuse(
                f"mix[{i}].prompt_tokens", list(entry.prompt_tokens), "[fewest, most], in this order"
            )


def _check_cluster(scenario: Scenario, source: Source) -> None:
    for i, group in enumerate(scenario.cluster):
        at = f"cluster[{i}]"
        if not group.models:
            raise source.refuse(f"{at}.models", [], "at least one model")
        _no_twins(source, f"{at}.models", group.models)
        _all_of(source, f"{at}.resident", group.resident or (), list(group.models))
        try:
            load_gpu(group.gpu)
            load_engine(group.engine)
            for model in group.models:
                scenario_model(scenario, model)
        except InputError as error:
            raise InputError(f"{source.place(at)}: {error}") from None
        if group.resident == ():
            raise source.refuse(f"{at}.resident", [], "at least one model, or no such key")


def _check_workload(scenario: Scenario, source: Source) -> None:
    workload = scenario.workload
    _check_arrivals(source, "workload.arrivals", workload.arrivals)
    without_rate = [entry for entry in scenario.mix if entry.rate_rps is None]
    if workload.arrivals != "trace" and workload.rate_rps is None and without_rate:
        raise InputError(
            f"{source.place('workload.rate_rps')}: missing, expected the mean arrivals per second, "
            f"which arrivals = {workload.arrivals!r} needs"
        )
    if workload.format is not None:
        _one_of(source, "workload.format", workload.format, list(FORMATS))


def _check_arrivals(source: Source, key: str, kind: str) -> None:
    try:
        parse_arrivals(kind)
    except InputError as error:
        raise InputError(f"{source.place(key)}: {error}") from None


def _no_twins(source: Source, key: str, names: Sequence[str]) -> None:
    twins = [name for i, name in enumerate(names) if name in names[:i]]
    if twins:
        raise InputError(f"{source.place(key)}: {twins[0]!r} is given twice, expected once")


def _one_of(source: Source, key: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise InputError(f"{source.place(key)}: found {name!r}; {did_you_mean(name, known)}")


def _all_of(source: Source, key: str, names: Sequence[str], known: list[str]) -> None:
    _no_twins(source, key, names)
    for name in names:
        _one_of(source, key, name, known)
