"""What the gateway costs, beside calling the engine directly and beside another gateway, in one run.

    python experiments/gateway_cost.py --peer LITELLM/bin/litellm

writes experiments/results/gateway_cost.{md,json}. Every process runs on this machine: a fake engine that is
never the bottleneck (an H100 played 10,000 times too fast), one gateway process, and the load. The gateway
has the last core to itself, engine and load share the others; on a machine that does other work too, its
processor time tells more than the wall clock. Clients keep their connections, with every server alike. The
peer is LiteLLM's proxy, from an environment of its own (``pip install "litellm[proxy]"``), with one worker,
logging off.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

RESULTS = Path(__file__).parent / "results"
MODEL = "llama-2-7b"
PEER = "LiteLLM"
PROMPT = "Tell me what the gateway in front of an engine costs. " * 4
ROUNDS = 3
CORES = sorted(os.sched_getaffinity(0))
GATEWAY_CORES = set(CORES[-1:])
RATES_RPS = (25.0, 500.0)
PEER_RATES_RPS = (25.0,)
"""More LiteLLM's one worker cannot serve here: its latency only grows."""
LATENCY_ROUNDS = 5
LATENCY_S = 3.0
"""How long each rate is kept in a round."""
TARGETS_MS = (500, 20_000)
BACKLOGS = (0, 1_000, 100_000)
PEER_SETTINGS = {"LITELLM_LOG": "ERROR", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
WAITING = {"input_file_id": "", "endpoint": "/v1/completions", "completion_window": "24h"}


def gateway_config(engine: str, folder: Path, more: str = "") -> Path:
    path = folder / "live.toml"
    path.write_text(
        f'[gateway]\nport = 0\nmax_body_mib = 64.0\n[[model]]\nname = "{MODEL}"\n[[engine]]\nid = "e0"\n'
        f'url = "{engine}"\nmodels = ["{MODEL}"]\ngpu = "H100"\nmax_num_seqs = 256\n{more}'
    )
    return path


def peer_config(engine: str, folder: Path) -> Path:
    path = folder / "litellm.yaml"
    path.write_text(
        f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n"
        f"      model: text-completion-openai/{MODEL}\n      api_base: {engine}/v1\n      api_key: none\n"
        "litellm_settings:\n  set_verbose: false\n  drop_params: false\n"
    )
    return path


class Process:
    """A server process, its URL, and the processor time that it and its children used."""

    def __init__(
        self, name: str, command: Sequence[str], url: str, log: Path, cores: set[int] | None = None
    ) -> None:
        """``cores``: those it runs on; None for the ones of this process."""
        self.name = name
        self.url = url
        self.log = log
        environment = os.environ | PEER_SETTINGS
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        if cores is not None:
            os.sched_setaffinity(self._process.pid, cores)

    async def up(self, path: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{self.name} does not start:\n{self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError):
                await asyncio.to_thread(urllib.request.urlopen, self.url + path, timeout=2)
                return
            await asyncio.sleep(0.2)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_engine(folder: Path, time_scale: float) -> Process:
    port = free_port()
    command = [sys.executable, __file__, "--engine", str(port), "--time-scale", str(time_scale)]
    return Process("engine", command, f"http://127.0.0.1:{port}", folder / f"engine-{port}.log")


def start_gateway(folder: Path, engine: str, more: str = "") -> Process:
    port = free_port()
    config = gateway_config(engine, folder, more)
    command = [sys.executable, "-m", "live.cli", "serve", str(config), "--port", str(port)]
    return Process("qlm-live", command, f"http://127.0.0.1:{port}", folder / "gateway.log", GATEWAY_CORES)


def start_peer(folder: Path, engine: str, program: str) -> Process:
    port = free_port()
    command = [
        program,
        "--config",
        str(peer_config(engine, folder)),
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    return Process(PEER, command, f"http://127.0.0.1:{port}", folder / "peer.log", GATEWAY_CORES)


# Load


def body(tokens: int, stream: bool) -> bytes:
    told = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "stream": stream}
    return json.dumps(told).encode()


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield session


async def ask(
    session: aiohttp.ClientSession, url: str, content: bytes, target_ms: int | None = None
) -> float:
    """Seconds to the whole answer. ``target_ms``: when its first token is due; None for the class's own."""
    start = time.perf_counter()
    headers = {"content-type": "application/json"}
    if target_ms is not None:
        headers["x-slo-ttft-ms"] = str(target_ms)
    async with session.post(f"{url}/v1/completions", data=content, headers=headers) as answer:
        await answer.read()
        if answer.status != 200:
            raise SystemExit(f"{url}: HTTP {answer.status}: {await answer.text()}")
    return time.perf_counter() - start


async def latencies(
    url: str, rate_rps: float, seconds: float, tokens: int, seed: int, target_ms: int | None = None
) -> list[float]:
    """Of requests that come at random, whether or not earlier ones are answered."""
    draw = random.Random(seed)
    content = body(tokens, False)
    async with client() as session:
        await asyncio.gather(*(ask(session, url, content) for _ in range(20)))  # connections are made
        start = time.perf_counter()
        at, tasks = 0.0, []
        while True:
            at += draw.expovariate(rate_rps)
            if at > seconds:
                break
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, url, content, target_ms)))
        return list(await asyncio.gather(*tasks))


async def throughput(
    server: Process, requests: int, at_once: int, tokens: int, stream: bool
) -> dict[str, float]:
    """So many requests, ``at_once`` under way: rates per second, and per second of the server's processor."""
    content = body(tokens, stream)
    left = requests
    async with client() as session:

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await ask(session, server.url, content)

        await ask(session, server.url, content)
        cpu_s, start = server.cpu_s(), time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        wall_s, cpu_s = time.perf_counter() - start, server.cpu_s() - cpu_s
    return {
        "requests_per_s": requests / wall_s,
        "tokens_per_s": requests * tokens / wall_s,
        "requests_per_cpu_s": requests / cpu_s,
        "tokens_per_cpu_s": requests * tokens / cpu_s,
    }


# Measurements


def quantiles_ms(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(values, (0.5, 0.99)) * 1000
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


async def measure_latency(servers: Sequence[Process]) -> dict[str, Any]:
    """By rate and server: quantiles of each round; servers take turns, so that all see the same machine."""
    told: dict[str, Any] = {}
    for rate_rps in RATES_RPS:
        rounds: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for number in range(LATENCY_ROUNDS):
            for server in servers:
                if server.name == PEER and rate_rps not in PEER_RATES_RPS:
                    continue
                found = await latencies(server.url, rate_rps, LATENCY_S, 4, seed=number)
                rounds[server.name].append(quantiles_ms(found))
                say(f"{rate_rps:g} requests/s, {server.name}: {rounds[server.name][-1]}")
        told[f"{rate_rps:g}"] = {name: found for name, found in rounds.items() if found}
    return told


async def measure_throughput(servers: Sequence[Process]) -> dict[str, Any]:
    """The best of the rounds, by server."""
    told: dict[str, Any] = {}
    for kind, (requests, at_once, tokens, stream) in {
        "whole": (2_000, 32, 4, False),
        "streamed": (200, 32, 200, True),
    }.items():
        rounds: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for _ in range(ROUNDS):
            for server in servers:
                fewer = requests // (8 if server.name == PEER else 1)
                rounds[server.name].append(await throughput(server, fewer, at_once, tokens, stream))
                say(f"{kind}, {server.name}: {rounds[server.name][-1]}")
        told[kind] = {
            name: {key: max(each[key] for each in found) for key in found[0]}
            for name, found in rounds.items()
        }
    return told


async def queue_batches(url: str, lines: int) -> list[str]:
    """Batches of up to 50,000 lines; returns their ids when all lines are accepted."""
    ids = []
    async with client() as session:
        for start in range(0, lines, 50_000):
            rows = (
                json.dumps(
                    {
                        "custom_id": f"line-{number}",
                        "method": "POST",
                        "url": "/v1/completions",
                        "body": {"model": MODEL, "prompt": f"{PROMPT}{number}", "max_tokens": 400},
                    }
                )
                for number in range(start, min(lines, start + 50_000))
            )
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field("file", "\n".join(rows).encode(), filename="in.jsonl")
            async with session.post(f"{url}/v1/files", data=form) as answer:
                file_id = (await answer.json())["id"]
            async with session.post(f"{url}/v1/batches", json=WAITING | {"input_file_id": file_id}) as answer:
                ids.append((await answer.json())["id"])
        for batch_id in ids:
            while True:
                async with session.get(f"{url}/v1/batches/{batch_id}") as answer:
                    if (await answer.json())["status"] == "in_progress":
                        break
                await asyncio.sleep(0.2)
    return ids


async def measure_backlog() -> dict[str, Any]:
    """Interactive latency while so many batch lines are queued, on an engine of an H100's true speed."""
    told = []
    folder = Path(tempfile.mkdtemp())
    for target_ms, lines in itertools.product(TARGETS_MS, BACKLOGS):
        engine = start_engine(folder, 1.0)
        place = Path(tempfile.mkdtemp(dir=folder))
        gateway = start_gateway(place, engine.url)
        try:
            await engine.up("/health")
            await gateway.up("/ready")
            start = time.perf_counter()
            if lines:
                await queue_batches(gateway.url, lines)
            accepted_s = time.perf_counter() - start
            await asyncio.sleep(3.0)  # the engine fills up
            cpu_s, start = gateway.cpu_s(), time.perf_counter()
            found = await latencies(gateway.url, 20.0, 15.0, 1, seed=1, target_ms=target_ms)
            spent_s = (gateway.cpu_s() - cpu_s) / (time.perf_counter() - start)
            told.append(
                {
                    "target_ms": target_ms,
                    "queued_lines": lines,
                    "accepted_s": accepted_s,
                    "requests": len(found),
                    **quantiles_ms(found),
                    "processor_share": spent_s,
                    "memory_mib": gateway.memory_mib(),
                }
            )
            say(f"backlog: {told[-1]}")
        finally:
            gateway.stop()
            engine.stop()
    shutil.rmtree(folder)
    return {"backlog": told}


async def measure(peer: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = start_engine(folder, 0.0001)
        await engine.up("/health")
        engine.name = "direct"
        servers = [engine, start_gateway(folder, engine.url)]
        if peer is not None:
            servers.append(start_peer(folder, engine.url, peer))
        try:
            await servers[1].up("/ready")
            for server in servers[2:]:
                await server.up("/health/liveliness")
            told = {
                "latency": await measure_latency(servers),
                "throughput": await measure_throughput(servers),
            }
        finally:
            for server in reversed(servers):
                server.stop()
    return told


# Report


def report(told: dict[str, Any]) -> str:
    names = [name for name in told["throughput"]["whole"] if name != "direct"]
    lines = [
        "# What the gateway costs",
        "",
        f"`{told['command']}`, {told['date']}, Python {told['python']}, {told['versions']}.",
        f"One machine of {told['cores']} cores, load average {told['load_average']:.1f} at the start: the",
        "gateway has one of them, the fake engine and the load the rest.",
        "",
        "## Added latency",
        "",
        "Whole answers of 4 tokens, arrivals at random; servers take turns. Told is the median of",
        f"{LATENCY_ROUNDS} rounds of {LATENCY_S:g} s each; all of them are in gateway_cost.json.",
        "",
        "| requests/s | | p50 | p99 | added p50 | added p99 |",
        "|---|---|---|---|---|---|",
    ]
    for rate, rounds in told["latency"].items():
        for name, found in rounds.items():
            p50, p99 = (float(np.median([each[key] for each in found])) for key in ("p50_ms", "p99_ms"))
            row = f"| {rate} | {name} | {p50:.2f} ms | {p99:.2f} ms |"
            if name == "direct":
                direct = p50, p99
                lines.append(f"{row} | |")
            else:
                lines.append(f"{row} {p50 - direct[0]:.2f} ms | {p99 - direct[1]:.2f} ms |")
    lines += [
        "",
        "## Throughput",
        "",
        f"32 requests at a time, the best of {ROUNDS} rounds. Processor: per second of the gateway's own.",
        "",
        "| | whole answers/s, wall | processor | streamed tokens/s, wall | processor |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        whole, streamed = (told["throughput"][kind][name] for kind in ("whole", "streamed"))
        lines.append(
            f"| {name} | {whole['requests_per_s']:,.0f} | {whole['requests_per_cpu_s']:,.0f} "
            f"| {streamed['tokens_per_s']:,.0f} | {streamed['tokens_per_cpu_s']:,.0f} |"
        )
    lines += [
        "",
        "## A backlog of batch lines",
        "",
        "Interactive requests of one token, 20 a second for 15 s, on an engine as fast as an H100 that works",
        "off the batches meanwhile, 256 lines at a time: its iterations take longer then, which is not the",
        "gateway's doing. Those due in 0.5 s evict lines; those due in 20 s wait for a place in the engine,",
        "since the scheduler is in no hurry. One run each.",
        "",
        "| due in | batch lines queued | accepted in | p50 | p99 | gateway's processor | its memory |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['target_ms'] / 1000:g} s | {row['queued_lines']:,} | {row['accepted_s']:.1f} s "
        f"| {row['p50_ms']:.1f} ms | {row['p99_ms']:.1f} ms "
        f"| {100 * row['processor_share']:.0f} % | {row['memory_mib']:.0f} MiB |"
        for row in told["backlog"]
    ]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def serve_engine(port: int, time_scale: float) -> None:
    import uvloop

    from live.fake.engine import FakeEngine
    from live.fake.serve import serve_forever
    from qlm_sim.models.deployment import deploy
    from qlm_sim.models.engine_config import EngineConfig
    from qlm_sim.models.engines import DEFAULT_ENGINE
    from qlm_sim.models.hardware import load_gpu
    from qlm_sim.models.specs import load_model

    config = EngineConfig(max_num_seqs=256)
    profile = deploy(
        load_model(MODEL), load_gpu("H100"), 1, config, engine=DEFAULT_ENGINE, storage_bytes_per_s=2e9
    )
    engine = FakeEngine(MODEL, profile, config, time_scale=time_scale, mean_output_tokens=10_000)
    uvloop.run(serve_forever(engine, "127.0.0.1", port))


def versions(peer: str | None) -> str:
    from qlm_sim import __version__

    told = f"qlm-live {__version__}"
    if peer is not None:
        python = str(Path(peer).parent / "python")
        code = "from importlib.metadata import version; print(version('litellm'))"
        told += (
            f", LiteLLM {subprocess.run([python, '-c', code], capture_output=True, text=True).stdout.strip()}"
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="LiteLLM's program, from an environment of its own")
    parser.add_argument("--backlog", action="store_true", help="measure the backlog alone, anew")
    parser.add_argument("--engine", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--time-scale", type=float, default=1.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        serve_engine(args.engine, args.time_scale)
        return
    if len(CORES) > 1:
        os.sched_setaffinity(0, set(CORES) - GATEWAY_CORES)
    results = RESULTS / "gateway_cost.json"
    if args.backlog:
        told = json.loads(results.read_text()) | asyncio.run(measure_backlog())
    else:
        load = os.getloadavg()[0]
        told = asyncio.run(measure(args.peer)) | asyncio.run(measure_backlog())
        told |= {
            "command": f"python {' '.join(sys.argv)}".replace(args.peer or "", "LITELLM"),
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_average": load,
            "versions": versions(args.peer),
        }
    results.write_text(json.dumps(told, indent=1) + "\n")
    RESULTS.joinpath("gateway_cost.md").write_text(report(told))
    print(report(told))


if __name__ == "__main__":
    main()
