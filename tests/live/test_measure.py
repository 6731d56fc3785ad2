"""A trace on live (fake) engines and in simulation: nothing is lost, and both tell the same story."""

import json

import pytest

from live.cli import main
from live.load import Told
from live.side_by_side import Row, forecast_accuracy
from qlm_sim.cli import main as qlm_sim
from qlm_sim.core.actions import Pull
from qlm_sim.core.events import FirstToken, RequestArrived
from qlm_sim.core.types import Request
from qlm_sim.metrics.recorder import RunRecorder

CONFIG = """
[[slo]]
name = "interactive"
ttft_s = 5.0
[[slo]]
name = "batch"
ttft_s = 60.0
[[model]]
name = "mistral-7b"
[[model]]
name = "llama-3.1-8b"
[[engine]]
id = "e0"
kind = "fake"
gpu = "h100"
swap = "sleep"
models = ["mistral-7b", "llama-3.1-8b"]
max_num_seqs = 4
"""
FLAGS = ["--config", "live.toml", "--rate", "40", "--requests", "40", "--scale-lengths", "0.03", "--quiet"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "live.toml").write_text(CONFIG)


def test_a_live_run_beside_its_simulation_and_its_event_log(tmp_path, capsys):
    assert main(["compare", *FLAGS, "--record", "events.jsonl", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["qlm"]
    figures = document["figures"]
    assert document["failed"] == {}
    assert figures["slo_attainment"]["live"] == figures["slo_attainment"]["simulated"] == 1.0
    assert document["forecast"]["all"]["requests"] == 40
    # Wall time on a busy machine is not the simulator's, but both did the same work.
    tokens = [
        figures["output_tokens_per_s"][k] * 40 / figures["throughput_rps"][k] for k in ("live", "simulated")
    ]
    assert tokens[0] == pytest.approx(tokens[1])
    summary = json.loads((tmp_path / "runs/live/summary.json").read_text())
    assert set(summary["policies"]) == {"qlm, live", "qlm, simulated"}
    assert all(run["finished"] == run["requests"] == 40 for run in summary["policies"].values())
    assert qlm_sim(["replay", "events.jsonl", "--quiet"]) == 0
    assert "every decision came out the same" in capsys.readouterr().out


def test_policies_run_one_after_the_other_on_the_same_requests(capsys):
    assert main(["replay", *FLAGS, "--policy", "vllm", "--policy", "edf", "--speedup", "2", "--json"]) == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    assert list(policies) == ["edf", "vllm"]
    assert all(run["requests"] == run["finished"] + run["rejected"] == 40 for run in policies.values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--policy qml", "--policy: found 'qml'"),
        ("--policy qlm --policy edf --record e", "--record: one event log"),
        ("--mix mistral-7b,interactive", "--mix: found 'mistral-7b,interactive'"),
        ("--mix gpt,interactive,1", "--mix: model 'gpt' is not in the config"),
        ("--mix mistral-7b,gold,1", "--mix: SLO class 'gold' is not in the config"),
        ("--mix mistral-7b,batch,-1", "--mix: found share -1"),
        ("--speedup 0", "--speedup: found 0.0"),
        ("--scale-lengths nan", "--scale-lengths: found nan"),
        ("none.json", "none.json: no such file"),
    ],
)
@pytest.mark.parametrize("command", ["replay", "compare"])
def test_bad_input_is_one_line(command, flags, said, capsys):
    assert main([command, *FLAGS, *flags.split()]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert said in output.err
    assert output.err.count("\n") == 1


def test_a_rate_is_wanted_where_the_trace_has_no_times(capsys):
    assert main(["replay", "--config", "live.toml"]) == 2
    assert "--rate: missing" in capsys.readouterr().err


def test_errors_are_relative_to_the_live_figure():
    assert Row("x", 2.0, 3.0).error == 0.5
    assert Row("x", 0.0, 3.0).error is None
    assert Row("x", None, 3.0).error is None


def test_a_perfect_forecast_scores_one_and_a_constant_one_nothing():
    recorder = RunRecorder()
    perfect, constant = {}, {}
    for number in range(10):
        name, waited = f"r{number}", 1.0 + number
        request = Request(name, "m", "slow", 20.0, float(number), 10, 100)
        recorder.record(number, [RequestArrived(request)], [Pull(name, 1, "i0")])
        recorder.record(number + waited, [FirstToken(name, 1, "i0")], [])
        perfect[name] = Told(64 + number, waited, waited, waited)
        constant[name] = Told(number, 5.5, 5.5, 9.5)
    requests = recorder.requests()
    scored = forecast_accuracy(requests, perfect)
    assert scored["backlogged"] == scored["all"]
    assert scored["all"] == {
        "requests": 10,
        "mean_wait_s": 5.5,
        "r2": 1.0,
        "bias": 0.0,
        "within_90_bound": 1.0,
    }
    assert scored["shallow"]["requests"] == 0
    scored = forecast_accuracy(requests, constant)
    assert scored["shallow"]["r2"] == 0.0
    assert scored["shallow"]["within_90_bound"] == 0.9
