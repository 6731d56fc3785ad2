"""The event log is the truth: written down and fed to a fresh core, it gives every decision again."""

import gzip
from dataclasses import replace

import numpy as np
import pytest

from qlm_sim.cli import main
from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.types import Lso, SloClass
from qlm_sim.errors import InputError
from qlm_sim.event_log import EventLogWriter, LogHeader, is_event_log, replay_event_log
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.hardware import TOKEN_GRID
from qlm_sim.models.step_time import StepModel
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload

MODELS = ("a", "b", "c")
SLOS = (SloClass("interactive", 5.0), SloClass("batch", 600.0))


def logged(path, policy, make_instance, admission=None, gap_s=0.4):
    """Simulate 300 requests under the policy, and write the event log."""
    rng = np.random.default_rng(11)
    work = Workload(
        ids=[f"r{i:05}" for i in range(300)],
        arrival_s=np.cumsum(rng.exponential(gap_s, 300)),
        prompt_tokens=rng.integers(1, 400, 300),
        output_tokens=rng.integers(1, 120, 300),
        max_tokens=np.full(300, 4096),
        models=MODELS,
        model_index=rng.integers(0, 3, 300),
        slo_classes=SLOS,
        slo_index=rng.integers(0, 2, 300),
    )
    step = StepModel(tuple(n * 1e-5 for n in TOKEN_GRID), 0.01, 0.0, 1e-5, 1e-8, 1e-9)
    instances = []
    for name in ("i0", "i1"):
        made = make_instance(name, MODELS)
        models = {model: replace(profile, step=step) for model, profile in made.models.items()}
        instances.append(replace(made, models=models))
    settings = SchedulerSettings(
        weights={"interactive": 3.0}, without=frozenset({Lso.EVICTION}), admission=admission
    )
    log = EventLogWriter(
        path, LogHeader(policy=policy, settings=settings, instances=tuple(instances), slo_classes=SLOS)
    )
    core = make_core(policy, instances, settings)
    simulate(
        work, instances, EngineConfig(max_num_seqs=4), core, log, solver=InlineSolver(solve), until_s=2e3
    )
    log.close()
    return path


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "clairvoyant"])
def test_a_fresh_core_decides_as_the_log_says(policy, make_instance, tmp_path):
    verdict = replay_event_log(str(logged(tmp_path / "log.jsonl", policy, make_instance)))
    assert verdict.difference is None
    assert verdict.header.settings.without == {Lso.EVICTION}
    assert verdict.events > 300
    assert verdict.orders > 100


def test_a_fresh_core_refuses_whom_the_log_says(make_instance, tmp_path):
    path = logged(tmp_path / "log.jsonl", "edf", make_instance, admission=0.9, gap_s=0.05)
    assert '["Reject"' in path.read_text()
    assert replay_event_log(str(path)).difference is None


def test_an_order_that_is_not_the_cores_is_found(make_instance, tmp_path):
    path = logged(tmp_path / "log.jsonl", "qlm", make_instance)
    lines = path.read_text().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if '["Pull"' in line)
    lines[number] = lines[number].replace('"attempt":1', '"attempt":2')
    path.write_text("".join(lines))
    difference = replay_event_log(str(path)).difference
    assert difference is not None
    assert difference.line == number + 1
    assert '"attempt":2' in difference.logged
    assert '"attempt":1' in difference.decided


def test_a_log_whose_writer_was_killed_is_replayed_up_to_there(make_instance, tmp_path):
    path = logged(tmp_path / "log.jsonl", "edf", make_instance)
    whole = replay_event_log(str(path))
    path.write_bytes(path.read_bytes()[:-40])
    verdict = replay_event_log(str(path))
    assert verdict.difference is None
    assert verdict.settles == whole.settles - 1
    assert verdict.cut is not None


def test_command_replays_a_log_and_tells_by_its_status(make_instance, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = logged(tmp_path / "log.jsonl", "qlm", make_instance)
    assert main(["replay", str(path), "--quiet"]) == 0
    assert "every decision came out the same" in capsys.readouterr().out
    assert "every decision came out the same" in (tmp_path / "runs/log/report.html").read_text()
    path.write_text(
        path.read_text().replace('"attempt":1,"instance":"i0"}]]', '"attempt":9,"instance":"i0"}]]', 1)
    )
    assert main(["replay", str(path), "--quiet", "--json"]) == 1
    assert '"attempt\\":9' in capsys.readouterr().out
    assert main(["replay", str(path), "--seed", "3"]) == 2
    assert "--seed: does not apply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"qlm_event_log":1,"policy":3}\n', ":1: not the header of an event log"),
        (
            '{"qlm_event_log":1,"policy":"fifo","settings":{},"instances":[],"slo_classes":[]}\n',
            ":1: policy 'fifo' is not known",
        ),
        (
            '{"qlm_event_log":9,"policy":"qlm","settings":{},"instances":[],"slo_classes":[]}\n',
            ":1: event log version 9",
        ),
    ],
)
def test_a_bad_header_is_told_in_one_line(text, said, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    assert is_event_log(str(path))
    with pytest.raises(InputError) as refusal:
        replay_event_log(str(path))
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"at":1.0,"events":[["Arrived",{}]],"orders":[]}', ":3: not an event: 'Arrived'; known: "),
        ('{"at":1.0,"events":[["TimerFired"]],"orders":[]}', ":3: not an event: "),
        ('{"at":1.0}', ":3: no settle"),
        ("nonsense", ":3: not JSON"),
    ],
)
def test_a_bad_line_is_told_with_its_number(line, said, make_instance, tmp_path):
    path = logged(tmp_path / "log.jsonl", "edf", make_instance)
    lines = path.read_text().splitlines()
    lines.insert(2, line)
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as refusal:
        replay_event_log(str(path))
    assert said in str(refusal.value)


def test_a_packed_log_is_recognised_and_other_files_are_not(make_instance, tmp_path):
    packed = tmp_path / "log.jsonl.gz"
    packed.write_bytes(gzip.compress(logged(tmp_path / "log.jsonl", "edf", make_instance).read_bytes()))
    assert is_event_log(str(packed))
    assert replay_event_log(str(packed)).difference is None
    assert not is_event_log(__file__)
    assert not is_event_log(str(tmp_path))
    assert not is_event_log(str(tmp_path / "none"))


def test_the_replay_of_a_log_explains_plans_and_leaves_out_the_report(
    make_instance, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = logged(tmp_path / "log.jsonl", "qlm", make_instance, gap_s=0.05)
    assert main(["replay", str(path), "--out", "o", "--no-report", "--explain", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "results: o" in told
    assert ", plan " in told
    assert sorted(each.name for each in (tmp_path / "o").iterdir()) == [
        "plans.jsonl",
        "requests.parquet",
        "summary.json",
    ]
