"""Scenarios: what ships loads, what is said twice agrees, what contradicts itself is refused."""

import json
import re
import tomllib
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path

import pytest

from qlm_sim.config import Scenario, load_scenario, shipped_scenarios, table_of
from qlm_sim.config.instances import host_models, instances, model_shares, next_resident
from qlm_sim.config.scenario import ClusterConfig
from qlm_sim.config.toml import toml_text
from qlm_sim.core.types import SloClass
from qlm_sim.errors import InputError
from qlm_sim.workload.mix import MixEntry

TEMPLATE = resources.files("qlm_sim.config").joinpath("template.toml").read_text()
MINIMAL = """
name = "small"
workload.rate_rps = 1
[[mix]]
model = "mistral-7b"
slo_class = "interactive"
share = 1
[[cluster]]
gpu = "A10"
count = 2
models = ["mistral-7b"]
"""


def load(text: str, tmp_path: Path, changes: dict[str, object] | None = None) -> Scenario:
    file = tmp_path / "s.toml"
    file.write_text(text)
    return load_scenario(str(file), changes or {}, {"workload.rate_rps": "--rate"} if changes else {})


@pytest.mark.parametrize("name", shipped_scenarios())
def test_shipped_scenario_is_named_as_its_file_and_fits_its_cluster(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.description
    specs = instances(scenario)
    assert len(specs) == sum(group.count for group in scenario.cluster)
    assert len({spec.id for spec in specs}) == len(specs)
    assert all(spec.resident in spec.models for spec in specs)


def test_scenarios_that_the_command_line_promises_ship() -> None:
    assert {"multi-model", "paper-wa", "paper-wb", "paper-wc"} <= set(shipped_scenarios())


def test_multi_model_has_more_models_than_its_instances_hold() -> None:
    scenario = load_scenario("multi-model")
    specs = instances(scenario)
    assert all(len(spec.models) > 1 for spec in specs)
    assert len({spec.id.rpartition("-")[0] for spec in specs}) > 1


@pytest.mark.parametrize("name", shipped_scenarios())
def test_resolved_text_loads_to_the_same_scenario(name: str, tmp_path: Path) -> None:
    scenario = load_scenario(name)
    assert load(toml_text(table_of(scenario)), tmp_path) == scenario


def test_summary_of_a_run_is_a_scenario(tmp_path: Path) -> None:
    scenario = load_scenario("paper-wc")
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"scenario": table_of(scenario), "policies": {}}))
    assert load_scenario(str(file)) == scenario


def test_template_loads_shows_every_key_and_tells_the_defaults(tmp_path: Path) -> None:
    assert load(TEMPLATE, tmp_path).name == "my-scenario"
    shown = tomllib.loads(
        "\n".join(
            line.removeprefix("# ") if re.match(r"# (\w+ = |\[models)", line) else line
            for line in TEMPLATE.splitlines()
        )
    )
    assert set(shown) == {field.name for field in fields(Scenario)}
    defaults = load(MINIMAL, tmp_path)
    for section in (defaults.workload, defaults.engine, defaults.scheduler, defaults.simulation):
        name = next(key for key in shown if getattr(defaults, key) is section)
        assert set(shown[name]) == {field.name for field in fields(section)}
        if name != "workload":
            told = {key: value for key, value in table_of(section).items() if value != []}
            assert told.items() <= shown[name].items()
    for name, kind in (("slo", SloClass), ("mix", MixEntry), ("cluster", ClusterConfig)):
        assert set(shown[name][0]) == {field.name for field in fields(kind)}


def test_default_classes_are_the_papers(tmp_path: Path) -> None:
    scenario = load(MINIMAL, tmp_path)
    assert {slo.name: slo.ttft_s for slo in scenario.slo} == {
        "interactive": 20.0,
        "batch-1": 60.0,
        "batch-2": 3600.0,
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("share = 1", "shares = 1", "mix[0].shares: unknown key; did you mean 'share'?"),
        (
            '"interactive"',
            '"interactiv"',
            "mix[0].slo_class: found 'interactiv'; did you mean 'interactive'?",
        ),
        ('model = "mistral-7b"', 'model = "mistral"', "mix[0].model: found 'mistral', which no [[cluster]]"),
        ('gpu = "A10"', 'gpu = "B10"', "cluster[0]: GPU 'B10' is not known"),
        (
            'models = ["mistral-7b"]',
            "models = []",
            "cluster[0].models: found [], expected at least one model",
        ),
        (
            'models = ["mistral-7b"]',
            'models = ["mistral-7b", "mistral-7b"]',
            "cluster[0].models: 'mistral-7b' is given twice",
        ),
        (
            'models = ["mistral-7b"]',
            'models = ["mistral-7b"]\nresident = ["qwen2.5-7b"]',
            "cluster[0].resident: found 'qwen2.5-7b'",
        ),
        ("count = 2", "count = 0", "cluster[0].count: found 0, expected a whole number at least 1"),
        ("workload.rate_rps = 1", "", "workload.rate_rps: missing, expected the mean arrivals per second"),
        ("workload.rate_rps = 1", "workload.rate_rps = -1", "found -1, expected a number above 0"),
        (
            "workload.rate_rps = 1",
            'workload = {rate_rps = 1, arrivals = "gama:2"}',
            "workload.arrivals: arrivals 'gama:2'",
        ),
        (
            "workload.rate_rps = 1",
            'workload = {rate_rps = 1, format = "azur"}',
            "workload.format: found 'azur'; did you mean 'azure'?",
        ),
        (
            "workload.rate_rps = 1",
            'workload.rate_rps = 1\nscheduler.policies = ["qlmm"]',
            "scheduler.policies: found 'qlmm'; did you mean 'qlm'?",
        ),
        (
            "workload.rate_rps = 1",
            'workload.rate_rps = 1\nscheduler.without = ["swap"]',
            "scheduler.without: found 'swap'; did you mean 'swapping'?",
        ),
        (
            "workload.rate_rps = 1",
            "workload.rate_rps = 1\nengine.max_num_batched_tokens = 8",
            "engine.max_num_batched_tokens: found 8, expected at least max_num_seqs (256)",
        ),
        ('name = "small"', 'name = "../up"', "name: found '../up'"),
        ('name = "small"', 'name = "small"\nslo = []', "slo: empty, expected at least one [[slo]]"),
        ('name = "small"', "name = small", "Invalid value"),
    ],
)
def test_contradiction_is_refused_in_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in MINIMAL
    with pytest.raises(InputError) as error:
        load(MINIMAL.replace(old, new), tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "s.toml") in str(error.value)
    assert "\n" not in str(error.value)


def test_flag_overrides_the_file_and_is_blamed_when_wrong(tmp_path: Path) -> None:
    assert load(MINIMAL, tmp_path, {"workload.rate_rps": 3}).workload.rate_rps == 3.0
    assert load(MINIMAL, tmp_path, {"workload.requests": None}).workload.requests is None
    with pytest.raises(InputError, match=r"^--rate: found 0, expected a number above 0$"):
        load(MINIMAL, tmp_path, {"workload.rate_rps": 0})


def test_unknown_scenario_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean 'multi-model'\?"):
        load_scenario("multimodel")
    with pytest.raises(InputError, match="no such file"):
        load_scenario("no/such.toml")


def test_model_that_does_not_fit_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    scenario = load(MINIMAL.replace("mistral-7b", "llama-2-70b"), tmp_path)
    with pytest.raises(InputError, match=r"cluster\[0\]: llama-2-70b does not fit .*GiB"):
        instances(scenario)


def test_models_are_dealt_by_their_share_of_the_mix() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    dealt = dict.fromkeys(shares, 0)
    for _ in range(100):
        dealt[next_resident(list(shares), shares, dealt)] += 1
    assert dealt == {"a": 50, "b": 30, "c": 20}


def test_given_residents_are_dealt_round(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        'models = ["mistral-7b"]',
        'models = ["mistral-7b", "qwen2.5-7b"]\nresident = ["qwen2.5-7b", "mistral-7b"]',
    )
    assert [spec.resident for spec in instances(load(text, tmp_path))] == ["qwen2.5-7b", "mistral-7b"]


def test_host_memory_holds_what_fits_the_most_wanted_used_last(tmp_path: Path) -> None:
    scenario = load_scenario("multi-model")
    spec = instances(scenario)[0]
    wanted = ["mistral-7b", "vicuna-13b", "qwen2.5-7b"]
    all_of_them = sum(spec.models[name].weight_bytes for name in wanted)
    assert host_models(wanted, "vicuna-13b", spec.models, all_of_them) == (
        "qwen2.5-7b",
        "mistral-7b",
        "vicuna-13b",
    )
    assert "qwen2.5-7b" not in host_models(wanted, "vicuna-13b", spec.models, all_of_them - 1)
    assert host_models(wanted, "vicuna-13b", spec.models, 0) == ()


def test_shares_add_up_to_one_whatever_their_scale(tmp_path: Path) -> None:
    scenario = load_scenario("multi-model")
    doubled = replace(scenario, mix=tuple(replace(entry, share=2 * entry.share) for entry in scenario.mix))
    assert sum(model_shares(scenario).values()) == pytest.approx(1)
    assert model_shares(doubled) == pytest.approx(model_shares(scenario))


def test_paths_of_a_file_are_relative_to_it_and_those_of_flags_to_where_we_are(
    tmp_path: Path, monkeypatch
) -> None:
    for place, gpu in (("file", "a10.toml"), ("here", "h100.toml")):
        (tmp_path / place).mkdir()
        shipped = resources.files("qlm_sim.hardware_profiles").joinpath(gpu).read_text()
        (tmp_path / place / "gpu.toml").write_text(shipped)
        (tmp_path / place / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    lines = MINIMAL.replace('"A10"', '"gpu.toml"').replace(
        "workload.rate_rps = 1", 'workload.rate_rps = 1\nworkload.tokenizer = "tokenizer.json"'
    )
    scenario = load(lines, tmp_path / "file")
    assert scenario.cluster[0].gpu == str(tmp_path / "file" / "gpu.toml")
    assert scenario.workload.tokenizer == str(tmp_path / "file" / "tokenizer.json")
    group = table_of(scenario)["cluster"][0] | {"gpu": "gpu.toml"}
    assert load(lines, tmp_path / "file", {"cluster": [group]}).cluster[0].gpu == str(
        tmp_path / "here/gpu.toml"
    )


def test_a_class_may_promise_the_last_token_alone(tmp_path: Path) -> None:
    slo = '[[slo]]\nname = "interactive"\ne2e_s = 60\n'
    scenario = load(MINIMAL + slo, tmp_path)
    assert scenario.slo == (SloClass("interactive", ttft_s=None, e2e_s=60.0),)
    assert load(toml_text(table_of(scenario)), tmp_path) == scenario
