"""Real vLLM engines that serve several models: measured, offered a trace, simulated, under two policies.

What experiments/live_cpu.py and experiments/gpu/live_gpu.py share. The engines are measured while idle, and
simulated as fast as they were in the warm-up; nothing else of the live runs has a part in their simulation.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np

from live.build import make_instance
from live.cli import main as qlm_live
from live.commands.workload_flags import make_workload
from live.config import LiveConfig, load_config
from live.engines.supervise import free_port
from live.measure import run_simulated, with_policy
from qlm_sim.config.toml import toml_text
from qlm_sim.workload.readers import read_trace
from qlm_sim.workload.workload import Trace

START_S = 900.0
"""Servers that are not up by then will not be."""
POLICIES = ("vllm", "qlm")
PREDICTED = ("ttft_s.mean", "ttft_s.p90", "e2e_s.mean", "e2e_s.p90")
WITHIN = 0.1
"""How far a simulated figure of these may be from the live one."""


@dataclass(frozen=True)
class Burst:
    """Work that comes all at once, as when somebody hands in a file of it."""

    at_s: float
    model: str
    slo_class: str
    engine_s: float
    """As much as one engine does in so many seconds."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The engines, and what they are offered."""

    python: str
    """An interpreter that has vLLM."""
    models: Mapping[str, str]
    """Folder with config.json, by the name of the model."""
    engines: Mapping[str, tuple[str, ...]]
    """By id: the models that the engine may serve, the first loaded at the start. A server runs for each."""
    flags: Sequence[str]
    """Of every server."""
    env: Mapping[str, str]
    engine: Mapping[str, Any]
    """Further keys of every engine in the configuration."""
    slo: Sequence[Mapping[str, Any]]
    scale: float
    """ShareGPT's lengths times this."""
    load: float
    """Steady arrivals over what the profiles say that the engines can do without swaps."""
    arriving_s: float
    steady: Sequence[str]
    """SLO classes of the steady arrivals, a Poisson process of all models and classes alike."""
    bursts: Sequence[Burst] = ()
    warm_up_s: float = 0.0
    """The first seconds, in which the scheduler learns lengths and speeds: no part of the figures ..."""
    warm_up_load: float = 0.0
    """... and their load: what is more than ``load`` is of the last of the steady classes, so that the
    others come at the rates that they keep."""
    measuring_s: float = 300.0
    seeds: Sequence[int] = (1,)
    """A run of each policy for each."""
    engine_env: Mapping[str, Mapping[str, str]] | None = None
    """Of the servers of one engine, such as the GPU that it may use."""
    one_by_one: bool = False
    """Whether no two servers start at once: each measures what memory of a GPU is free."""
    cores: Mapping[str, int] | None = None
    """By engine: the CPU that it has to itself, as far as other engines go, and shares with its server."""


def measure(setup: Setup) -> dict[str, Any]:
    """Of each run under "runs" what ``qlm-live compare --json`` says, its policy and seed."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="qlm-live-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with us
        urls, servers = _start_servers(setup, folder, stack)
        config = folder / "live.toml"
        config.write_text(_config(setup, urls, {}))
        _say("engines are up; measuring them")
        words = ["profile", "--config", str(config), "--out", str(folder), "--quiet"]
        words += ["--shared-cores"] if setup.cores is not None else []
        profiled = _command(*words, "--seconds", str(setup.measuring_s))
        _say(profiled.rstrip())
        config.write_text(
            _config(setup, urls, {name: str(folder / f"{name}.toml") for name in setup.engines})
        )
        capacity_rps = _capacity_rps(setup, load_config(config))
        runs = []
        for seed in setup.seeds:
            trace = folder / f"trace-{seed}.csv"
            requests = _write_trace(setup, capacity_rps, seed, trace)
            for policy in POLICIES:
                _say(f"{policy}: {requests} requests, seed {seed}")
                flags = [str(trace), "--config", str(config), "--policy", policy, "--seed", str(seed)]
                flags += ["--warm-up", str(setup.warm_up_s), "--out", str(folder / f"{policy}-{seed}")]
                before = _cpu_s(servers)
                said = json.loads(_command("compare", *flags, "--json", "--quiet"))[policy]
                took = {name: after_s - before[name] for name, after_s in _cpu_s(servers).items()}
                took["scheduler"] = said.pop("cpu_s")
                runs.append({"policy": policy, "seed": seed, "requests": requests, "cpu_s": took} | said)
    return {
        "capacity_rps": capacity_rps,
        "rate_rps": setup.load * capacity_rps,
        "profiles": profiled.replace(f"{folder}/", "").splitlines(),
        "runs": runs,
    }


def _write_trace(setup: Setup, capacity_rps: float, seed: int, path: Path) -> int:
    """The requests of one run as a trace with times, models and classes. Returns how many there are."""
    rng = np.random.default_rng(seed)
    models = list(setup.models)
    rows: list[tuple[float, str, str]] = []
    more = max(0.0, setup.warm_up_load - setup.load)
    for load, end, classes in (
        (setup.load, setup.arriving_s, setup.steady),
        (more, setup.warm_up_s, setup.steady[-1:]),
    ):
        times = rng.uniform(0.0, end, rng.poisson(load * capacity_rps * end))
        rows += [(float(at), str(rng.choice(models)), str(rng.choice(classes))) for at in times]
    for burst in setup.bursts:
        count = round(burst.engine_s * capacity_rps / len(setup.engines))
        rows += [(burst.at_s, burst.model, burst.slo_class)] * count
    rows = [rows[at] for at in rng.permutation(len(rows))]  # what comes at one time comes in any order
    rows.sort(key=lambda row: row[0])
    lengths = read_trace("sharegpt", format=None, warn=lambda note: None)
    chosen = _drawn_alike([(*kind, at < setup.warm_up_s) for at, *kind in rows], lengths, rng)
    with path.open("w") as file:
        print("arrival_s,model,slo_class,prompt_tokens,output_tokens", file=file)
        for (at, model, slo_class), row in zip(rows, chosen, strict=True):
            tokens = [
                max(1, round(float(column[row]) * setup.scale))
                for column in (lengths.prompt_tokens, lengths.output_tokens)
            ]
            print(f"{at:.6f},{model},{slo_class},{tokens[0]},{tokens[1]}", file=file)
    return len(rows)


def _drawn_alike(parts: Sequence[object], lengths: Trace, rng: np.random.Generator) -> list[int]:
    """A row of the trace for each entry. Every part has outputs as long as the others': one from each of as
    many strata of them as the part has entries, in any order.

    A service knows its lengths from thousands of requests. A warm-up of three hundred, drawn at random, would
    tell their mean to 6 %, and what a run shows would be that chance.
    """
    by_length = np.argsort(lengths.output_tokens, kind="stable")
    rows = np.empty(len(parts), dtype=np.int64)
    for part in dict.fromkeys(parts):
        at = [index for index, each in enumerate(parts) if each == part]
        strata = (rng.permutation(len(at)) + rng.random(len(at))) / len(at)
        rows[at] = by_length[(strata * len(by_length)).astype(np.int64)]
    return [int(row) for row in rows]


def _start_servers(
    setup: Setup, folder: Path, stack: ExitStack
) -> tuple[dict[str, dict[str, str]], list[int]]:
    """A server for each engine and model, one after the other on each engine; their URLs and processes."""
    urls: dict[str, dict[str, str]] = {name: {} for name in setup.engines}
    servers = []
    env = os.environ | setup.env
    for turn in range(max(map(len, setup.engines.values()))):
        started = []
        for engine, models in setup.engines.items():
            if turn >= len(models):
                continue
            model, port = models[-1 - turn], free_port()
            log = stack.enter_context((folder / f"{engine}-{model}.log").open("wb"))
            own = dict((setup.engine_env or {}).get(engine, {}))
            command = [setup.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
            command += ["--port", str(port), "--model", setup.models[model], "--served-model-name", model]
            if setup.cores is not None:
                command = ["taskset", "--cpu-list", str(setup.cores[engine]), *command]
            server = subprocess.Popen(
                [*command, *setup.flags], env=env | own, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_stop, server)
            servers.append(server.pid)
            urls[engine][model] = f"http://127.0.0.1:{port}"
            started.append((server, urls[engine][model], Path(log.name)))
            if setup.one_by_one:
                _until_healthy(*started[-1])
        for server, url, path in started:
            _until_healthy(server, url, path)
        if turn < max(map(len, setup.engines.values())) - 1:
            for _, url, _ in started:  # the next one needs the GPU to itself
                with urlopen(f"{url}/sleep?level=1", data=b"", timeout=START_S):
                    pass
    return urls, servers


def _cpu_s(servers: Sequence[int]) -> dict[str, float]:
    """CPU seconds of the servers so far: of their engines, which vLLM runs in processes of their own, and of
    what is beside them (HTTP, tokens and text). As Linux tells."""
    engines = [
        int(child)
        for pid in servers
        for thread in Path(f"/proc/{pid}/task").glob("*/children")
        for child in thread.read_text().split()
    ]
    taken = {}
    for name, pids in (("engines", engines), ("servers", servers)):
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        taken[name] = sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")
    return taken


def _stop(server: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _until_healthy(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"{url} does not come up; its last words:\n{log.read_text()[-2000:]}")


def _config(setup: Setup, urls: Mapping[str, Mapping[str, str]], profiles: Mapping[str, str]) -> str:
    return toml_text(
        {
            "slo": [dict(each) for each in setup.slo],
            "model": [
                {"name": name, "config": str(Path(folder) / "config.json")}
                for name, folder in setup.models.items()
            ],
            "engine": [
                {"id": name, "models": list(models), "urls": dict(urls[name]), "swap": "sleep"}
                | dict(setup.engine)
                | ({"gpu": profiles[name]} if name in profiles else {})
                for name, models in setup.engines.items()
            ],
        }
    )


def _command(*words: str) -> str:
    """Run ``qlm-live``; its output, which is also told if it fails."""
    said = io.StringIO()
    with redirect_stdout(said):
        status = qlm_live(words)
    if status != 0:
        raise SystemExit(f"qlm-live {' '.join(words)} failed\n{said.getvalue()}")
    return said.getvalue()


def _capacity_rps(setup: Setup, config: LiveConfig) -> float:
    """Requests per second of the measured engines when all come at once and nothing is swapped."""
    flags = Namespace(
        trace="sharegpt", requests=1_000, rate=1e6, arrivals="poisson", speedup=1.0, mix=None, seed=99,
        scale_lengths=setup.scale, format=None, warm_up=0.0,
    )  # fmt: skip
    specs = [
        replace(make_instance(engine, config).spec, resident=setup.engines[engine.id][0])
        for engine in config.engine
    ]
    longest = {
        name: min(spec.models[name].max_model_len for spec in specs if name in spec.models)
        for name in setup.models
    }
    workload, _ = make_workload(flags, config, longest)
    run = run_simulated(with_policy(config, "static"), workload, tuple(specs))
    throughput: float = run.run.summary["throughput_rps"]
    return throughput


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _errors(runs: Sequence[Mapping[str, Any]]) -> str:
    """Two cells: the errors of what was predicted, averaged over runs, and whether they are small enough."""
    sums = [
        [sum(figures[key][world] for figures in runs) for key in PREDICTED] for world in ("live", "simulated")
    ]
    errors = [simulated / live - 1 for live, simulated in zip(*sums, strict=True)]
    met = "yes" if all(abs(error) <= WITHIN for error in errors) else "no"
    return f"{', '.join(f'{100 * error:+.1f} %' for error in errors)} | {met}"


def _pooled_r2(parts: Sequence[Mapping[str, Any]]) -> float | None:
    """R² of the requests of all parts that have one, together. None where none has."""
    parts = [each for each in parts if each["r2"] is not None]
    if not parts:
        return None
    count = np.array([each["requests"] for each in parts])
    mean, sd, r2 = (np.array([each[key] for each in parts]) for key in ("mean_wait_s", "sd_wait_s", "r2"))
    within = count * sd**2
    between = count * (mean - (count * mean).sum() / count.sum()) ** 2
    return 1.0 - float(((1.0 - r2) * within).sum() / (within + between).sum())


def write(out: Path, name: str, title: str, text: str, document: dict[str, Any]) -> None:
    """``name``.json and ``name``.md in ``out``, and the table on stdout."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    lines = [f"# {title}", "", text, "", *(f"* {line}" for line in document["profiles"])]
    shares = [key for key in document["runs"][0]["figures"] if key.startswith("slo_attainment")]
    names = [key.removeprefix("slo_attainment.") for key in shares[1:]]
    lines += ["", f"| seed | policy | SLO met | {' | '.join(names)} | TTFT mean, s | E2E mean, s | swaps |"]
    lines.append("|---" * (6 + len(names)) + "|")
    for run in document["runs"]:
        live = {key: row["live"] for key, row in run["figures"].items()}
        cells = [f"{100 * live[key]:.1f} %" for key in shares]
        cells += [f"{live[key]:.2f}" for key in ("ttft_s.mean", "e2e_s.mean")] + [f"{live['swaps']:.0f}"]
        lines.append(f"| {run['seed']} | {run['policy']} | {' | '.join(cells)} |")
    heads = (
        f"simulation's error: {', '.join(PREDICTED)} | all within 10 % | by profiles alone | all within 10 %"
    )
    lines += ["", f"| seed | policy | times as slow as profiled, by engine | {heads} | R² of backlogs |"]
    lines.append("|---" * 8 + "|")
    for run in document["runs"]:
        r2 = run["forecast"]["backlogged"]["r2"]
        slow = ", ".join(f"{factor:.2f}" for factor in run["times_as_slow"].values())
        told = f"{_errors([run['figures']])} | {_errors([run['figures_by_profile']])}"
        lines.append(
            f"| {run['seed']} | {run['policy']} | {slow} | {told} | {'' if r2 is None else f'{r2:.3f}'} |"
        )
    if len({run["seed"] for run in document["runs"]}) > 1:
        for policy in POLICIES:
            runs = [run for run in document["runs"] if run["policy"] == policy]
            told = " | ".join(
                _errors([run[key] for run in runs]) for key in ("figures", "figures_by_profile")
            )
            r2 = _pooled_r2([run["forecast"]["backlogged"] for run in runs])
            lines.append(f"| all | {policy} | | {told} | {'' if r2 is None else f'{r2:.3f}'} |")
    heads = "engines | servers beside them | scheduler and load generator"
    lines += ["", f"| seed | policy | CPU, s: {heads} |", "|---|---|---|---|---|"]
    for run in document["runs"]:
        took = run["cpu_s"]
        beside = f"{took['servers']:.0f}, {1e3 * took['servers'] / run['requests']:.1f} ms a request"
        cells = [f"{took['engines']:.0f}", beside, f"{took['scheduler']:.0f}"]
        lines.append(f"| {run['seed']} | {run['policy']} | {' | '.join(cells)} |")
    for run in document["runs"]:
        lines += ["", f"## {run['policy']}, seed {run['seed']}: {run['requests']} requests", ""]
        lines += ["| | live | simulated | error |", "|---|---|---|---|"]
        for key, row in sorted(run["figures"].items()):
            error = "" if row["error"] is None else f"{100 * row['error']:+.1f} %"
            cells = ["" if row[k] is None else f"{row[k]:.4g}" for k in ("live", "simulated")]
            lines.append(f"| {key} | {cells[0]} | {cells[1]} | {error} |")
        lines += ["", "| waits as told at arrival | requests | mean, s | R² | bias | within 90 % bound |"]
        lines.append("|---|---|---|---|---|---|")
        for key, each in sorted(run["forecast"].items()):
            if each["requests"]:
                cells = ["" if each[k] is None else f"{each[k]:.3f}" for k in ("mean_wait_s", "r2", "bias")]
                covered = f"{100 * each['within_90_bound']:.0f} %"
                lines.append(f"| {key} | {each['requests']} | {' | '.join(cells)} | {covered} |")
        if run["failed"]:
            lines += ["", f"Failed: {len(run['failed'])}."]
    text = "\n".join(lines) + "\n"
    (out / f"{name}.md").write_text(text)
    print(text)
