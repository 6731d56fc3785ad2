"""The replay command end to end: what it prints, what it leaves, and that every flag counts."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from qlm_sim.cli import build_parser, main, replay
from qlm_sim.config import load_scenario, table_of
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import POLICIES
from qlm_sim.replay import replay as run_replay
from qlm_sim.solver import solvers

SMALL = ["--requests", "40", "--quiet"]
TWO = [*SMALL, "--policy", "qlm", "--policy", "edf"]
ONE = [*SMALL, "--policy", "vllm"]
QLM_SIM = [sys.executable, "-c", "import sys; from qlm_sim.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def summary(*flags: str) -> dict[str, Any]:
    """summary.json of a run of one policy."""
    assert main(["replay", *ONE, "--out", "out", *flags]) == 0
    return json.loads(Path("out/summary.json").read_text())


def test_all_policies_run_on_the_same_requests_and_none_is_lost() -> None:
    runs = run_replay(replay.resolve(build_parser().parse_args(["replay", "--requests", "60"])))
    assert [run.name for run in runs] == list(POLICIES)
    offered = set()
    for run in runs:
        figures = run.summary
        assert figures["requests"] == 60
        assert figures["requests"] == figures["finished"] + figures["unfinished"] + figures["rejected"]
        assert figures["unfinished"] == 0 or run.name == "static"  # which serves no model that is not loaded
        offered.add((run.requests.arrival_s.tobytes(), run.requests.prompt_tokens.tobytes()))
    assert len(offered) == 1


def test_table_is_printed_and_the_last_line_tells_where_the_report_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["replay", *TWO]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "SLO met" in output.out
    assert "edf" in output.out
    assert output.out.splitlines()[-2] == "engine: vllm-0.11"
    assert output.out.splitlines()[-1] == "report: runs/multi-model/report.html"
    assert Path("runs/multi-model/report.html").exists()


def test_without_a_report_the_figures_alone_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *ONE, "--out", "full"]) == 0
    assert main(["replay", *ONE, "--out", "lean", "--no-report"]) == 0
    assert capsys.readouterr().out.endswith("results: lean\n")
    lean = {path.name: path.read_bytes() for path in Path("lean").iterdir()}
    assert set(lean) == {"summary.json", "requests.parquet", "plans.jsonl"}
    assert lean == {name: (Path("full") / name).read_bytes() for name in lean}


def test_one_seed_gives_the_same_bytes_in_one_process_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, out in ((1, "one"), (2, "two")):
        monkeypatch.setattr(replay, "_cpus", lambda cpus=cpus: cpus)
        assert main(["replay", *TWO, "--out", out]) == 0
    names = sorted(file.name for file in Path("one").iterdir())
    assert names == sorted(file.name for file in Path("two").iterdir())
    for name in names:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name


def test_json_prints_the_summary_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *ONE, "--json"]) == 0
    assert capsys.readouterr().out == Path("runs/multi-model/summary.json").read_text()


def test_summary_is_a_scenario_that_repeats_the_run() -> None:
    first = summary("--rate", "3.3333333333333335", "--max-num-seqs", "9")
    assert main(["replay", "--quiet", "--scenario", "out/summary.json", "--out", "again"]) == 0
    assert json.loads(Path("again/summary.json").read_text()) == first
    assert Path("again/requests.parquet").read_bytes() == Path("out/requests.parquet").read_bytes()


FLAGS = {
    "--requests 7": ("workload.requests", 7),
    "--rate 2.5": ("workload.rate_rps", 2.5),
    "--arrivals gamma:2": ("workload.arrivals", "gamma:2"),
    "--format vidur": ("workload.format", "vidur"),
    "--tokenizer t.json": ("workload.tokenizer", "t.json"),
    "--seed 5": ("seed", 5),
    "--policy edf --policy qlm": ("scheduler.policies", ["edf", "qlm"]),
    "--without swapping --without eviction": ("scheduler.without", ["swapping", "eviction"]),
    "--solver milp": ("scheduler.solver", "milp"),
    "--admission 0.5": ("scheduler.admission", 0.5),
    "--engine stepping": ("simulation.engine", "stepping"),
    "--horizon 2": ("simulation.horizon_s", 2.0),
    "--max-num-seqs 2": ("engine.max_num_seqs", 2),
    "--max-num-batched-tokens 300": ("engine.max_num_batched_tokens", 300),
    "--block-size 32": ("engine.block_size", 32),
    "--gpu-memory-utilization 0.95": ("engine.gpu_memory_utilization", 0.95),
    "--max-model-len 3000": ("engine.max_model_len", 3000),
    "--scheduling-policy priority": ("engine.scheduling_policy", "priority"),
    "--num-gpu-blocks 999": ("engine.num_gpu_blocks", 999),
    "--watermark 0.01": ("engine.watermark", 0.01),
    "--enable-prefix-caching": ("engine.enable_prefix_caching", True),
    "--scheduler-reserve-full-isl": ("engine.scheduler_reserve_full_isl", True),
    "--scenario paper-wa": ("name", "paper-wa"),
}


def resolved(flags: str) -> dict[str, Any]:
    """The scenario of a command line, as a plain table."""
    return table_of(replay.resolve(build_parser().parse_args(["replay", *flags.split()])))


@pytest.mark.parametrize("flags", FLAGS)
def test_flag_changes_the_scenario_that_is_run(flags: str) -> None:
    key, value = FLAGS[flags]
    held = resolved(flags)
    for part in key.split("."):
        held = held[part]
    assert held == value


def test_every_engine_setting_has_a_flag() -> None:
    told = {key.partition(".")[2] for key, _ in FLAGS.values() if key.startswith("engine.")}
    assert told == {field.name for field in fields(EngineConfig)}


def figures(flags: str) -> dict[str, Any]:
    return run_replay(replay.resolve(build_parser().parse_args(["replay", *flags.split()])))[0].summary


@pytest.mark.parametrize(
    "flags",
    [
        "--requests 90",
        "--rate 2.5",
        "--arrivals gamma:2",
        "--seed 5",
        "--horizon 2",
        "--max-num-seqs 2",
        "--max-num-batched-tokens 300 --max-num-seqs 200",
        "--num-gpu-blocks 300 --block-size 32",
        "--max-model-len 600",
        "--without swapping --horizon 900",
        "--admission 1.0",
        "--scenario paper-wa",
        "--gpu H100 --count 1",
        "--tp 2",
        "--model mistral-7b",
    ],
)
def test_flag_changes_the_results(flags: str) -> None:
    before = "--policy qlm --requests 100 --rate 50"
    assert figures(f"{before} {flags}") != figures(before)


def test_cluster_flags_make_one_group_of_like_instances() -> None:
    scenario = resolved("--gpu A100-80 --count 3 --tp 2")
    (group,) = scenario["cluster"]
    assert (group["gpu"], group["count"], group["tp"]) == ("A100-80", 3, 2)
    assert set(group["models"]) == {entry["model"] for entry in scenario["mix"]}


def test_model_flags_spread_the_mix_evenly_and_keep_its_classes(tmp_path: Path) -> None:
    config = tmp_path / "my-2.5-model" / "config.json"
    config.parent.mkdir()
    config.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "num_attention_heads": 8,
                "hidden_size": 1024,
                "num_hidden_layers": 4,
                "intermediate_size": 4096,
                "vocab_size": 1000,
                "max_position_embeddings": 9000,
            }
        )
    )
    scenario = resolved(f"--model qwen2.5-7b --model-config {config}")
    assert scenario["cluster"][0]["models"] == ["qwen2.5-7b", "my-2.5-model"]
    assert scenario["models"] == {"my-2.5-model": {"config": str(config)}}
    before = load_scenario("multi-model").mix
    for name in ("qwen2.5-7b", "my-2.5-model"):
        share = sum(entry["share"] for entry in scenario["mix"] if entry["model"] == name)
        assert share == pytest.approx(sum(entry.share for entry in before) / 2)
    for slo in ("interactive", "batch-2"):
        now = sum(entry["share"] for entry in scenario["mix"] if entry["slo_class"] == slo)
        assert now == pytest.approx(sum(entry.share for entry in before if entry.slo_class == slo))


def test_given_trace_is_taken_whole_and_keeps_its_times(tmp_path: Path) -> None:
    lines = ["arrival_s,prompt_tokens,output_tokens"] + [f"{i * 2},{50 + i},{10 + i}" for i in range(12)]
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")

    def arrivals(flags: str) -> NDArray[np.float64]:
        args = build_parser().parse_args(["replay", "mine.csv", "--policy", "vllm", *flags.split()])
        trace, scenario = replay.read(args, replay.resolve(args), [], lambda what, done, total: None)
        return run_replay(scenario, trace=trace)[0].requests.arrival_s

    assert arrivals("").tolist() == [i * 2 for i in range(12)]
    assert np.diff(arrivals("--rate 5")) == pytest.approx(1 / 5)
    assert np.diff(arrivals("--rate 4 --arrivals uniform --requests 5")).tolist() == [0.25] * 4


def test_scenario_from_init_checks_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenario", "init", "mine.toml"]) == 0
    assert main(["scenario", "check", "mine.toml"]) == 0
    printed = capsys.readouterr().out
    assert "Offered load:" in printed
    assert "a100-80-1" in printed
    assert summary("--scenario", "mine.toml")["scenario"]["name"] == "my-scenario"


def test_bad_model_config_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["replay", "--model-config", "config.json"]) == 2
    assert capsys.readouterr().err.startswith("qlm-sim: error: config.json: architecture")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def cpu_s(pid: int) -> float:
    """Processor time of a process and its children, in seconds; 0 where it has ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    own_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own_s + sum(cpu_s(int(child)) for child in children)


@pytest.mark.parametrize("policies", [("qlm",), ("qlm", "vllm")])
def test_ctrl_c_ends_a_run_in_one_line_and_leaves_nothing(policies: tuple[str, ...], tmp_path: Path) -> None:
    flags = [flag for policy in policies for flag in ("--policy", policy)]
    run = subprocess.Popen(
        [*QLM_SIM, "replay", "--requests", "300000", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores the signal, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while cpu_s(run.pid) < 2.5:  # its imports are done, and it simulates
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "qlm-sim: error: interrupted"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_machine_reads_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["gpus"]["H200"]["bandwidth_bytes_per_s"] == 4.8e12
    assert known["models"]["llama-2-7b"]["kv_bytes_per_token"] == 2 * 32 * 4096 * 2


@pytest.mark.parametrize("command", ["policies", "profile list"])
def test_reader_that_leaves_early_hears_no_complaint(command: str) -> None:
    run = subprocess.Popen(
        [*QLM_SIM, *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait(timeout=30) != 0


def test_milp_says_once_and_counts_which_plans_were_too_large_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "MOST_PLACES", 8)
    flags = ["--policy", "qlm", "--requests", "150", "--rate", "40", "--solver", "milp", "--out", "out"]
    assert main(["replay", *flags]) == 0
    (figures,) = json.loads(Path("out/summary.json").read_text())["policies"].values()
    assert 0 < figures["plan_fallbacks"] <= figures["plans"]
    notes = [line for line in capsys.readouterr().err.splitlines() if "large for solver milp" in line]
    assert len(notes) == 1
    assert f"{figures['plan_fallbacks']} of {figures['plans']} plans" in notes[0]


@pytest.mark.parametrize(("rate", "saturated"), [(4, False), (20, True)])
def test_a_run_too_short_to_show_it_is_saturated_by_the_load_offered(
    rate: int, saturated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine takes them all in at once: nobody waits, and they are served long after."""
    flags = f"--gpu A100-80 --count 1 --model llama-2-7b --rate {rate} --requests 200 --policy vllm"
    capsys.readouterr()
    assert main(["replay", *flags.split(), "--no-report", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)["policies"]["vllm"]
    assert (told["offered_load"] > 1) == told["saturated"] == saturated
    assert (f"ask for {told['offered_load']:.0%} of what" in told["saturation"]) == saturated


def test_a_run_that_stops_before_anybody_comes_has_a_load_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = "--gpu A100-80 --count 1 --model llama-2-7b --rate 20 --requests 50 --policy vllm --horizon 1e-9"
    capsys.readouterr()
    assert main(["replay", *flags.split(), "--no-report", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)["policies"]["vllm"]
    assert told["offered_load"] > 1
    assert not told["saturated"]


def test_a_few_requests_have_no_load(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--gpu A100-80 --count 1 --model llama-2-7b --rate 200 --requests 5 --policy vllm"
    capsys.readouterr()
    assert main(["replay", *flags.split(), "--no-report", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)["policies"]["vllm"]
    assert told["offered_load"] is None
    assert not told["saturated"]


def test_newer_engines_admit_by_whole_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    """As vLLM's scheduler_reserve_full_isl, which is on from 0.19; a scenario may say otherwise."""
    assert main(["scenario", "init", "new.toml"]) == 0
    scenario = Path("new.toml")
    small = "--num-gpu-blocks 400 --rate 60 --policy edf"
    told = []
    for version, said in (("0.11", ""), ("0.32", ""), ("0.32", "scheduler_reserve_full_isl = false\n")):
        text = scenario.read_text().replace("[engine]\n", f"[engine]\n{said}")
        text = text.replace('# engine = "vllm-0.11" ', f'engine = "vllm-{version}" ')
        Path("one.toml").write_text(text)
        flags = f"--scenario one.toml {small} --requests 300 --quiet --no-report --json"
        capsys.readouterr()
        assert main(["replay", *flags.split()]) == 0
        told.append(json.loads(capsys.readouterr().out)["policies"]["edf"]["preemptions"])
    by_chunks, by_prompts, told_otherwise = told
    assert by_prompts < told_otherwise
    assert by_prompts < by_chunks


def test_an_engine_version_whose_scheduler_is_not_simulated_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["scenario", "init", "old.toml"]) == 0
    scenario = Path("old.toml")
    scenario.write_text(scenario.read_text().replace('# engine = "vllm-0.11" ', 'engine = "vllm-0.6" '))
    capsys.readouterr()
    assert (
        main(["replay", "--scenario", "old.toml", "--requests", "5", "--policy", "vllm", "--no-report"]) == 0
    )
    output = capsys.readouterr()
    assert "vllm-0.6 ran vLLM's V0 scheduler, which is simulated by V1's rules" in output.err
    assert "engine: vllm-0.6\n" in output.out


@pytest.mark.parametrize("policy", ["qlm", "clairvoyant"])
def test_leaps_and_single_steps_make_the_same_plans(policy: str) -> None:
    """Their sums differ in the last digits; where KV blocks are short, those once decided between plans."""
    short = "--gpu A100-80 --count 1 --model llama-2-7b --rate 10 --num-gpu-blocks 600 --seed 77"
    ended = []
    for engine in ("leap", "stepping"):
        flags = f"--requests 200 --policy {policy} --engine {engine} --out {engine} --no-report --quiet"
        assert main(["replay", *short.split(), *flags.split()]) == 0
        ended.append(pd.read_parquet(f"{engine}/requests.parquet").finished_s)
    np.testing.assert_allclose(*ended, rtol=1e-9)
