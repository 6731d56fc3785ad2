"""The load of ``gateway_cost``: completions that come at random or one after the other, and batches."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator

import aiohttp
from gateway_servers import MODEL, Process

PROMPT = "Tell me what the gateway in front of an engine costs. " * 4
WAITING = {"input_file_id": "", "endpoint": "/v1/completions", "completion_window": "24h"}


def body(tokens: int, stream: bool) -> bytes:
    told = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "stream": stream}
    return json.dumps(told).encode()


@contextlib.asynccontextmanager
async def client(*, kept: bool = True) -> AsyncIterator[aiohttp.ClientSession]:
    """``kept``: whether connections serve one request after another, or each request makes its own."""
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0, force_close=not kept)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
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
    url: str,
    rate_rps: float,
    seconds: float,
    tokens: int,
    seed: int,
    *,
    target_ms: int | None = None,
    kept: bool = True,
) -> list[float]:
    """Of requests that come at random, whether or not earlier ones are answered."""
    draw = random.Random(seed)
    content = body(tokens, False)
    async with client(kept=kept) as session:
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
    server: Process, requests: int, at_once: int, tokens: int, stream: bool, kept: bool
) -> dict[str, float]:
    """So many requests, ``at_once`` under way: rates per second, and per second of the server's processor."""
    content = body(tokens, stream)
    left = requests
    async with client(kept=kept) as session:

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
