"""``qlm-sim validate``: the simulated engine's own logs have no error, others have theirs."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qlm_sim.cli import main
from qlm_sim.validation.comparison import compare

ROOT = Path(__file__).parents[2]
LOG = (
    Path(os.environ.get("QLM_DATA", ROOT.parent / "shared"))
    / "profiles/blis/vllm0.11_h100_jan21-llama7b-train-1_requests.csv"
)
ENGINE = "--gpu A10 --model mistral-7b"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """A log in log.csv whose times are the simulated ones."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(
        {
            "arrival": np.cumsum(rng.exponential(0.4, 60)),
            "prompt": rng.integers(10, 900, 60),
            "output": rng.integers(1, 80, 60),
            "ttft": 1.0,
        }
    )
    frame.to_csv("log.csv", index=False)
    assert main(f"validate log.csv {ENGINE} --quiet".split()) == 0
    times = pd.read_parquet("runs/validate-log/requests.parquet")
    frame["ttft"], frame["e2e"] = times.simulated_ttft_s, times.simulated_e2e_s
    frame.to_csv("log.csv", index=False)
    return frame


def summary(command: str, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(command.split()) == 0
    return json.loads(capsys.readouterr().out)


def test_the_simulators_own_log_has_no_error(log: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    found = summary(f"validate log.csv {ENGINE} --json --quiet --out o", capsys)
    assert set(found["metrics"]) == {"ttft_s", "tpot_s", "e2e_s"}
    for each in found["metrics"].values():
        assert set(each["real"]) == set(each["simulated"]) == {"mean", "p50", "p90", "p99"}
        assert each["mape"] < 1e-6
    assert found["engine"] == "vllm-0.11"
    assert found["kernels"]["kind"] == "estimate"
    assert json.loads(Path("o/summary.json").read_text()) == found
    assert Path("o/scatter.png").read_bytes().startswith(b"\x89PNG")


def test_slower_measurements_show_as_errors(log: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    log.assign(ttft=2 * log.ttft, e2e=2 * log.e2e).to_csv("log.csv", index=False)
    found = summary(f"validate log.csv {ENGINE} --json --quiet", capsys)
    for each in found["metrics"].values():
        assert each["mape"] == pytest.approx(0.5)
        assert all(error == pytest.approx(-0.5) for error in each["error"].values())


def test_less_kv_cache_makes_requests_wait(log: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    Path("engine.log").write_text("# GPU blocks: 70, # CPU blocks: 0\n")
    ample = summary(f"validate log.csv {ENGINE} --json --quiet --out a", capsys)
    short = summary(f"validate log.csv {ENGINE} --engine-log engine.log --json --quiet --out b", capsys)
    assert short["kv_capacity_tokens"] == 70 * 16
    assert (
        short["metrics"]["e2e_s"]["simulated"]["mean"] > 1.05 * ample["metrics"]["e2e_s"]["simulated"]["mean"]
    )


def test_seeds_tell_what_is_chance(log: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    found = summary(f"validate log.csv {ENGINE} --repeat 4 --json --quiet", capsys)
    again = found["repeated"]
    assert again["repeats"] == 4
    for name, each in found["metrics"].items():
        assert again[name]["mean"] == pytest.approx(each["simulated"]["mean"], rel=0.5)
        assert again["ci95"][name]["mean"] > 0
    assert main(f"validate log.csv {ENGINE} --repeat 4 --quiet".split()) == 0
    assert "over 4 seeds" in capsys.readouterr().out


def test_a_rate_that_rises_is_no_saturation_where_the_load_is_low(
    log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ever more requests run then, at any load."""
    rng = np.random.default_rng(1)
    rising = pd.DataFrame({"arrival": 40 * np.sqrt(rng.random(2_000)), "prompt": 200})
    rising = rising.assign(output=rng.integers(100, 400, 2_000), ttft=0.1).sort_values("arrival")
    rising.to_csv("log.csv", index=False)
    flags = "--gpu H100 --model llama-2-7b --count 8 --json --quiet"
    found = summary(f"validate log.csv {flags}", capsys)
    assert found["offered_load"] < 0.6
    assert not found["saturated"]


def test_seeds_are_over_the_requests_that_have_a_measured_time(
    log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here those of short prompts, whose first token takes least."""
    short = log.prompt < 300
    log.assign(ttft=log.ttft.where(short)).to_csv("log.csv", index=False)
    found = summary(f"validate log.csv {ENGINE} --repeat 5 --json --quiet", capsys)
    alone = found["metrics"]["ttft_s"]["simulated"]["p50"]
    assert found["repeated"]["ttft_s"]["p50"] == pytest.approx(alone, rel=0.3)


def test_requests_of_one_length_leave_nothing_to_chance(
    log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    log.assign(prompt=300, output=40).to_csv("log.csv", index=False)
    found = summary(f"validate log.csv {ENGINE} --repeat 3 --json --quiet", capsys)
    for name, each in found["metrics"].items():
        assert found["repeated"][name] == pytest.approx(each["simulated"])
        assert found["repeated"]["ci95"][name]["p99"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("none.csv --gpu A10 --model mistral-7b", "none.csv: no such file"),
        ("log.csv --gpu B200 --model mistral-7b", "GPU 'B200' is not known"),
        ("log.csv --gpu A10 --model mistral-7b --engine tgi-2", "engine 'tgi-2' is not known"),
        ("log.csv --gpu A10 --model mistral-7b --count 0", "--count: found 0"),
        ("log.csv --gpu A10 --model mistral-7b --repeat 0", "--repeat: found 0"),
        (
            "log.csv --gpu A10 --model mistral-7b --num-gpu-blocks 20",
            "tokens, and the engine takes 320",
        ),
        ("log.csv --gpu A10 --model mistral-7b --max-num-seqs 4096", "--max-num-batched-tokens: found 2048"),
        ("log.csv --gpu A10 --model mistral-7b --engine-log log.csv", "log.csv: no KV cache size"),
    ],
)
def test_bad_input_is_one_line(
    flags: str, message: str, log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["validate", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_errors_are_over_requests_that_have_both_times() -> None:
    found = compare(np.array([1.0, np.nan, 2.0, 0.0]), np.array([1.1, 5.0, 1.0, 0.2]))
    assert found is not None
    assert found["requests"] == 3
    assert found["mape"] == pytest.approx((0.1 + 0.5) / 2)
    assert found["error"]["mean"] == pytest.approx((1.1 + 1.0 + 0.2) / 3.0 - 1)
    assert compare(np.array([np.nan]), np.array([1.0])) is None


def test_a_default_of_sequences_gives_way_to_a_small_token_budget(
    log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in vLLM: what is given is kept, what is not is lowered to it."""
    found = summary(f"validate log.csv {ENGINE} --max-num-batched-tokens 100 --json --quiet --out o", capsys)
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (100, 100)


def test_another_scheduler_than_the_simulated_one_is_told(
    log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(f"validate log.csv {ENGINE} --engine vllm-0.6.3 --quiet --out o".split()) == 0
    assert "vllm-0.6.3 ran vLLM's V0 scheduler" in capsys.readouterr().out
    assert summary(f"validate log.csv {ENGINE} --json --quiet --out o", capsys)["engine_scheduler"] == "v1"


def test_measured_queue_times_are_shown_beside_no_simulated_ones(
    log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    log.assign(queue=2.5).drop(columns=["ttft", "e2e"]).to_csv("queue.csv", index=False)
    capsys.readouterr()
    assert main(f"validate queue.csv {ENGINE} --quiet --out o".split()) == 0
    assert "queue   mean  2.50 s" in capsys.readouterr().out


@pytest.mark.skipif(not LOG.is_file(), reason=f"no measured log: set QLM_DATA ({LOG} is absent)")
def test_a_real_log_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = summary(f"validate {LOG} --gpu H100 --model llama-2-7b --json --quiet", capsys)
    assert found["requests"] == 282
    assert found["metrics"]["e2e_s"]["mape"] <= 0.03
    assert found["metrics"]["tpot_s"]["mape"] <= 0.03
    assert abs(found["metrics"]["ttft_s"]["error"]["mean"]) <= 0.05


def test_a_profile_of_another_name_has_the_limits_of_its_gpu(
    log: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = (ROOT / "qlm_sim/hardware_profiles/a100-80.toml").read_text()
    Path("mine.toml").write_text(shipped.replace('name = "A100-80"', 'name = "mine"'))
    own, named = (
        summary(f"validate log.csv --gpu {gpu} --model mistral-7b --json --quiet --out {out}", capsys)
        for gpu, out in (("mine.toml", "a"), ("A100-80", "b"))
    )
    assert own["kv_capacity_tokens"] == named["kv_capacity_tokens"]


def test_without_a_gpu_the_fit_starts_from_one_that_the_requests_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.csv").write_text("arrival,prompt,output,ttft,e2e\n0,60000,50,9.0,12.0\n60,500,50,0.1,1.5\n")
    command = "profile fit long.csv --model llama-3.1-8b --out mine.toml --quiet"
    assert main(command.split()) == 0
