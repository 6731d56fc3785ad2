"""A trace on live (fake) engines and in simulation: nothing is lost, and both tell the same story."""

import json

import pytest

from live.cli import main
from live.commands import profile
from live.load import Told
from live.side_by_side import Row, forecast_accuracy
from qlm_sim.cli import main as qlm_sim
from qlm_sim.core.actions import Pull
from qlm_sim.core.events import FirstToken, RequestArrived
from qlm_sim.core.types import Request
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.models.engines import load_engine
from qlm_sim.models.hardware import load_gpu
from qlm_sim.models.specs import load_model
from qlm_sim.models.step_time import step_model
from qlm_sim.models.swap import swap_in_s

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


def test_what_comes_in_the_warm_up_is_served_and_not_counted(tmp_path, capsys):
    rows = [(0.05 * i, "mistral-7b", "batch", 20, 5) for i in range(30)]
    lines = ["arrival_s,model,slo_class,prompt_tokens,output_tokens", *(",".join(map(str, r)) for r in rows)]
    (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n")
    flags = ["trace.csv", "--config", "live.toml", "--warm-up", "0.49", "--quiet", "--record", "events.jsonl"]
    assert main(["compare", *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["qlm"]
    assert document["forecast"]["all"]["requests"] == 20
    assert document["cpu_s"] > 0
    summary = json.loads((tmp_path / "runs/live/summary.json").read_text())
    for run in summary["policies"].values():
        assert run["requests"] == run["finished"] == 20
        assert run["throughput_rps"] == pytest.approx(20 / 1.0, rel=0.5)  # over the second that they took
    assert (tmp_path / "events.jsonl").read_text().count('["RequestArrived"') == 30


def test_engines_are_simulated_as_fast_as_they_were_in_the_warm_up(tmp_path, capsys):
    """An engine four times as slow as its profile is known for it by the 24 requests of the warm-up."""
    (tmp_path / "slow.toml").write_text(CONFIG + "speed = 0.25\n")
    rows = [(0.05 * i if i < 24 else 5.0 + 0.3 * i, "mistral-7b", "batch", 20, 20) for i in range(32)]
    lines = ["arrival_s,model,slo_class,prompt_tokens,output_tokens", *(",".join(map(str, r)) for r in rows)]
    (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n")
    flags = ["trace.csv", "--config", "slow.toml", "--warm-up", "10", "--quiet"]
    assert main(["compare", *flags, "--policy", "vllm", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["vllm"]
    assert 2.0 < document["times_as_slow"]["e0"] < 5.0
    error, alone = (document[key]["e2e_s.mean"]["error"] for key in ("figures", "figures_by_profile"))
    assert alone < -0.6
    assert abs(error) < 0.6 * abs(alone)
    assert main(["compare", *flags]) == 0
    said = capsys.readouterr().out
    assert "as slow as in the warm-up" in said
    assert "by profiles alone" in said


def test_profiles_of_two_engines_are_measured_in_step_with_their_swaps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "SWAP_ROUNDS", 1)
    engine = CONFIG[CONFIG.index("[[engine]]") :].replace("seqs = 4", "seqs = 2") + "max_model_len = 256\n"
    config = CONFIG[: CONFIG.index("[[engine]]")] + engine + engine.replace("e0", "e1")
    (tmp_path / "two.toml").write_text(config)
    flags = ["--seconds", "1", "--shared-cores", "--quiet", "--out", "profiles"]
    assert main(["profile", "--config", "two.toml", *flags]) == 0
    said = capsys.readouterr().out
    assert said.count("fitted") == said.count("swaps: ") == said.count("requests: each holds") == 2
    h100 = load_gpu("h100")
    for name in ("e0", "e1"):
        gpu = load_gpu(tmp_path / "profiles" / f"{name}.toml")
        model = load_model("mistral-7b")
        found, truth = (step_model(model, each, 1, load_engine("vllm-0.11")) for each in (gpu, h100))
        # Fakes take the profile's times and a busy machine's delays.
        assert found.iteration_s(2, 2, 200, 0) == pytest.approx(truth.iteration_s(2, 2, 200, 0), rel=0.4)
        assert gpu.intake_s is not None
        # Swapping there is putting to sleep as well, for which the fake takes a tenth.
        assert gpu.wake_s.kind == "measured"
        assert gpu.wake_s.value == pytest.approx(h100.wake_s.value + 0.1 * swap_in_s(model, h100, 1), rel=0.5)


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
        ("--warm-up -1", "--warm-up: found -1.0"),
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
        "sd_wait_s": pytest.approx(8.25**0.5),
        "r2": 1.0,
        "bias": 0.0,
        "within_90_bound": 1.0,
    }
    assert scored["shallow"]["requests"] == 0
    scored = forecast_accuracy(requests, constant)
    assert scored["shallow"]["r2"] == 0.0
    assert scored["shallow"]["within_90_bound"] == 0.9
