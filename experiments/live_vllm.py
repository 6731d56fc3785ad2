"""Real vLLM engines that serve several models: measured, offered a trace, simulated, under two policies.

What experiments/live_cpu.py and experiments/gpu/live_gpu.py share. The engines are measured while idle, and
nothing else is fitted: the live runs take no part in the profiles by which they are simulated.
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

from live.build import make_instance
from live.cli import main as qlm_live
from live.commands.workload_flags import make_workload
from live.config import LiveConfig, load_config
from live.engines.supervise import free_port
from live.measure import run_simulated, with_policy
from qlm_sim.config.toml import toml_text

START_S = 900.0
"""Servers that are not up by then will not be."""
POLICIES = ("vllm", "qlm")


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
    """Arrivals over what the profiles say that the engines can do without swaps."""
    arriving_s: float
    engine_env: Mapping[str, Mapping[str, str]] | None = None
    """Of the servers of one engine, such as the GPU that it may use."""


def measure(setup: Setup) -> dict[str, Any]:
    """{"rate_rps", "policies": {policy: what ``qlm-live compare --json`` says}}."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="qlm-live-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with us
        urls = _start_servers(setup, folder, stack)
        config = folder / "live.toml"
        config.write_text(_config(setup, urls, {}))
        _say("engines are up; measuring them")
        _command("profile", "--config", str(config), "--out", str(folder), "--quiet")
        config.write_text(
            _config(setup, urls, {name: str(folder / f"{name}.toml") for name in setup.engines})
        )
        rate = setup.load * _capacity_rps(setup, load_config(config))
        compared: dict[str, Any] = {}
        for policy in POLICIES:
            _say(f"{policy}: {rate:.1f} requests/s for {setup.arriving_s:.0f} s")
            flags = ["--config", str(config), "--policy", policy, "--rate", f"{rate:.3f}", "--seed", "1"]
            flags += ["--requests", str(int(rate * setup.arriving_s)), "--scale-lengths", str(setup.scale)]
            compared |= json.loads(_command("compare", *flags, "--out", str(folder / policy), "--json"))
    return {"rate_rps": rate, "load": setup.load, "scale": setup.scale, "policies": compared}


def _start_servers(setup: Setup, folder: Path, stack: ExitStack) -> dict[str, dict[str, str]]:
    """A server for each engine and model, one after the other on each engine; their URLs."""
    urls: dict[str, dict[str, str]] = {name: {} for name in setup.engines}
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
            server = subprocess.Popen(
                [*command, *setup.flags], env=env | own, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_stop, server)
            urls[engine][model] = f"http://127.0.0.1:{port}"
            started.append((server, urls[engine][model], Path(log.name)))
        for server, url, path in started:
            _until_healthy(server, url, path)
        if turn < max(map(len, setup.engines.values())) - 1:
            for _, url, _ in started:  # the next one needs the GPU to itself
                with urlopen(f"{url}/sleep?level=1", data=b"", timeout=START_S):
                    pass
    return urls


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
    if words[0] == "profile":
        _say(said.getvalue().rstrip())
    return said.getvalue()


def _capacity_rps(setup: Setup, config: LiveConfig) -> float:
    """Requests per second of the measured engines when all come at once and nothing is swapped."""
    flags = Namespace(
        trace="sharegpt", requests=1_000, rate=1e6, arrivals="poisson", speedup=1.0, mix=None, seed=99,
        scale_lengths=setup.scale, format=None,
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
    throughput: float = run.summary["throughput_rps"]
    return throughput


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(out: Path, name: str, title: str, text: str, document: dict[str, Any]) -> None:
    """``name``.json and ``name``.md in ``out``, and the table on stdout."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    lines = [f"# {title}", "", text]
    for policy, figures in document["policies"].items():
        lines += ["", f"## {policy}", "", "| | live | simulated | error |", "|---|---|---|---|"]
        for key, row in sorted(figures["figures"].items()):
            error = "" if row["error"] is None else f"{100 * row['error']:+.1f} %"
            cells = ["" if row[k] is None else f"{row[k]:.4g}" for k in ("live", "simulated")]
            lines.append(f"| {key} | {cells[0]} | {cells[1]} | {error} |")
        lines += ["", "| waits as told at arrival | requests | mean, s | R² | bias | within 90 % bound |"]
        lines.append("|---|---|---|---|---|---|")
        for key, each in sorted(figures["forecast"].items()):
            if each["requests"]:
                cells = ["" if each[k] is None else f"{each[k]:.3f}" for k in ("mean_wait_s", "r2", "bias")]
                covered = f"{100 * each['within_90_bound']:.0f} %"
                lines.append(f"| {key} | {each['requests']} | {' | '.join(cells)} | {covered} |")
        if figures["failed"]:
            lines += ["", f"Failed: {len(figures['failed'])}."]
    text = "\n".join(lines) + "\n"
    (out / f"{name}.md").write_text(text)
    print(text)
