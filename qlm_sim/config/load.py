"""Finding and reading scenarios: shipped ones by name, others from a TOML file, or a past run's summary.

Values that flags set are read by the same rules as the file's, and named by the flag when they are wrong.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qlm_sim.config.check import check_scenario
from qlm_sim.config.scenario import LIMITS, ModelConfig, Scenario
from qlm_sim.config.table import Source, did_you_mean, read_table
from qlm_sim.errors import InputError
from qlm_sim.workload.readers import BUILT_IN

DEFAULT_SCENARIO = "multi-model"

_SHIPPED = resources.files("qlm_sim") / "scenarios"


def shipped_scenarios() -> dict[str, str]:
    """The scenarios that come with the package: name to TOML text."""
    files = (file for file in _SHIPPED.iterdir() if file.name.endswith(".toml"))
    return {file.name.removesuffix(".toml"): file.read_text() for file in sorted(files, key=lambda f: f.name)}


def load_scenario(
    name_or_file: str,
    changes: Mapping[str, Any] = MappingProxyType({}),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> Scenario:
    """A shipped scenario by name, or one from a ``.toml`` file or a run's ``summary.json``.

    ``changes``: dotted key ("workload.rate_rps") to the value put over the file's own; None takes the key
    away. ``flags``: dotted key to what the user knows the change by ("--rate"). Raises InputError, naming
    the file and key, or the flag, that is wrong.
    """
    table, folder, name = _tables(name_or_file)
    for key, value in changes.items():
        *parents, last = key.split(".")
        at = table
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise InputError(f"{name}: {parent}: expected a table")
        at[last] = value
        if value is None:
            del at[last]
    source = Source(name, LIMITS, flags)
    scenario = read_table(Scenario, table, source)
    scenario = _with_whole_paths(scenario, folder, changes)
    check_scenario(scenario, source)
    return scenario


def _with_whole_paths(scenario: Scenario, folder: Path, changes: Mapping[str, Any]) -> Scenario:
    """Paths of a file are relative to it, those of a change to where we are."""

    def whole(path: str, key: str) -> str:
        return str(((Path() if key in changes else folder) / path).absolute())

    workload = scenario.workload
    if workload.trace not in BUILT_IN:
        workload = replace(workload, trace=whole(workload.trace, "workload.trace"))
    if workload.tokenizer is not None:  # or a name of Hugging Face's
        tokenizer = whole(workload.tokenizer, "workload.tokenizer")
        workload = replace(workload, tokenizer=tokenizer if Path(tokenizer).exists() else workload.tokenizer)
    models = {name: ModelConfig(whole(model.config, "")) for name, model in scenario.models.items()}
    cluster = tuple(
        replace(group, gpu=whole(group.gpu, "cluster")) if group.gpu.endswith(".toml") else group
        for group in scenario.cluster
    )
    return replace(scenario, workload=workload, models=models, cluster=cluster)


def _tables(name_or_file: str) -> tuple[dict[str, Any], Path, str]:
    """The raw tables, the folder that paths in them are relative to, and the source's name."""
    shipped = shipped_scenarios()
    if name_or_file in shipped:
        return tomllib.loads(shipped[name_or_file]), Path(), f"scenario {name_or_file}"
    path = Path(name_or_file)
    if not path.suffix and path.name == name_or_file and not path.exists():
        raise InputError(f"scenario {name_or_file!r}: not known; {did_you_mean(name_or_file, [*shipped])}")
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputError(f"scenario {path}: {(error.strerror or str(error)).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"scenario {path}: {error}") from None
    if path.suffix == ".json":
        table = table.get("scenario") if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise InputError(
                f"scenario {path}: a .json scenario is a run's summary.json; no 'scenario' in it"
            )
    return table, path.parent, str(path)
