"""What the gateway costs, beside calling the engine directly and beside another gateway, in one run.

    python experiments/gateway_cost.py --peer LITELLM/bin/litellm

writes experiments/results/gateway_cost.{md,json}. Every process runs on this machine: a fake engine that is
never the bottleneck (an H100 played 10,000 times too fast), one gateway process, and the load. The gateway
has the last core to itself, engine and load share the others; on a machine that does other work too, its
processor time tells more than the wall clock. Clients keep their connections, with every server alike, but
where told that each request makes its own. The peer is LiteLLM's proxy, from an environment of its own
(``pip install "litellm[proxy]"``), with one worker, logging off.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gateway_load import latencies, queue_batches, throughput
from gateway_servers import CORES, GATEWAY_CORES, PEER, Process, start_engine, start_gateway, start_peer

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3
NEW = ", new connections"
LOADS = {"25": (25.0, True), "500": (500.0, True), f"500{NEW}": (500.0, False)}
"""Requests per second, and whether clients keep their connections."""
PEER_RATES_RPS = (25.0,)
"""More LiteLLM's one worker cannot serve here: its latency only grows."""
LATENCY_ROUNDS = 5
LATENCY_S = 3.0
"""How long each rate is kept in a round."""
TARGETS_MS = (500, 20_000)
BACKLOGS = (0, 1_000, 100_000)


def quantiles_ms(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(values, (0.5, 0.99)) * 1000
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


async def measure_latency(servers: Sequence[Process]) -> dict[str, Any]:
    """By rate and server: quantiles of each round; servers take turns, so that all see the same machine."""
    told: dict[str, Any] = {}
    for load, (rate_rps, kept) in LOADS.items():
        rounds: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for number in range(LATENCY_ROUNDS):
            for server in servers:
                if server.name == PEER and rate_rps not in PEER_RATES_RPS:
                    continue
                found = await latencies(server.url, rate_rps, LATENCY_S, 4, seed=number, kept=kept)
                rounds[server.name].append(quantiles_ms(found))
                say(f"{load} requests/s, {server.name}: {rounds[server.name][-1]}")
        told[load] = {name: found for name, found in rounds.items() if found}
    return told


async def measure_throughput(servers: Sequence[Process]) -> dict[str, Any]:
    """The best of the rounds, by server."""
    told: dict[str, Any] = {}
    for kind, (requests, at_once, tokens, stream, kept) in {
        "whole": (2_000, 32, 4, False, True),
        f"whole{NEW}": (2_000, 32, 4, False, False),
        "streamed": (200, 32, 200, True, True),
    }.items():
        rounds: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for _ in range(ROUNDS):
            for server in servers:
                fewer = requests // (8 if server.name == PEER else 1)
                rounds[server.name].append(await throughput(server, fewer, at_once, tokens, stream, kept))
                say(f"{kind}, {server.name}: {rounds[server.name][-1]}")
        told[kind] = {
            name: {key: max(each[key] for each in found) for key in found[0]}
            for name, found in rounds.items()
        }
    return told


async def measure_backlog() -> dict[str, Any]:
    """Interactive latency while so many batch lines are queued, on an engine of an H100's true speed."""
    told = []
    folder = Path(tempfile.mkdtemp())
    for target_ms, lines in itertools.product(TARGETS_MS, BACKLOGS):
        engine = start_engine(folder, 1)
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
        engine = start_engine(folder, 10_000)
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
        f"| | whole answers/s, wall | processor | the same{NEW} | processor "
        "| streamed tokens/s, wall | processor |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        whole, apart, streamed = (
            told["throughput"][kind][name] for kind in ("whole", f"whole{NEW}", "streamed")
        )
        lines.append(
            f"| {name} | {whole['requests_per_s']:,.0f} | {whole['requests_per_cpu_s']:,.0f} "
            f"| {apart['requests_per_s']:,.0f} | {apart['requests_per_cpu_s']:,.0f} "
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
    args = parser.parse_args()
    if len(CORES) > 1:
        os.sched_setaffinity(0, set(CORES) - GATEWAY_CORES)
    results = RESULTS / "gateway_cost.json"
    if args.backlog:
        told = json.loads(results.read_text()) | asyncio.run(measure_backlog())
    else:
        load = os.getloadavg()[0]
        told = asyncio.run(measure(args.peer)) | asyncio.run(measure_backlog())
        told |= {
            "command": " ".join(
                ["python", *(word.replace(args.peer, "LITELLM") if args.peer else word for word in sys.argv)]
            ),
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
