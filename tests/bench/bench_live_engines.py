"""What the drivers cost: CPU seconds of this process, with a fake engine in another one.

    make bench, or python -m pytest tests/bench/bench_live_engines.py --benchmark-only

Also the reason for a streaming client of our own: the same streams read with aiohttp.
"""

import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import aiohttp
import pytest
from fakes import PROFILE, QuickStep, job, serving_jobs, tokens_of

from live.engines.backend import Call
from live.engines.http import HttpBackend
from live.engines.instance import Instance
from live.engines.residency import Sleepers
from live.engines.supervise import AttachedServer, free_port
from live.fake.engine import FakeEngine
from live.fake.serve import serve_forever
from live.jobs import COMPLETIONS
from qlm_sim.models.engine_config import EngineConfig

uvloop = pytest.importorskip("uvloop")
pytestmark = pytest.mark.benchmark(timer=time.process_time, warmup=False)

FAST = replace(
    PROFILE,
    step=QuickStep(base=2e-3),
    max_num_seqs=256,
    kv_capacity_tokens=1 << 20,
    max_num_batched_tokens=8192,
)
SHAPES = [(100, 100), (1000, 1)]
"""(streams, tokens of each)"""


def _serve(port: int) -> None:
    uvloop.run(serve_forever(FakeEngine("a", FAST, EngineConfig()), "127.0.0.1", port))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(port,), daemon=True)
    process.start()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            break
        except OSError:
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()


class Counter:
    """Listens to one stream and counts."""

    def __init__(self, number: int, tokens: int) -> None:
        self.call = Call(f"c{number}", COMPLETIONS, body(number, tokens))
        self.tokens = 0
        self.done = asyncio.get_running_loop().create_future()

    def said(self, choice, token_ids, prompt_token_ids):
        self.tokens += len(token_ids)

    def ended(self, usage):
        self.done.set_result(self.tokens)


def body(number: int, tokens: int) -> dict[str, object]:
    return {
        "prompt": tokens_of(f"c{number}"),
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


@pytest.mark.parametrize(("streams", "tokens"), SHAPES)
def test_streams_over_our_wire(url, benchmark, streams, tokens):
    async def main():
        backend = HttpBackend(url, "a")
        counters = [Counter(number, tokens) for number in range(streams)]
        for counter in counters:
            backend.start(counter)
        said = await asyncio.gather(*(counter.done for counter in counters))
        await backend.close()
        return sum(said)

    assert benchmark.pedantic(lambda: uvloop.run(main()), rounds=3) == streams * tokens


@pytest.mark.parametrize(("streams", "tokens"), SHAPES)
def test_streams_over_aiohttp(url, benchmark, streams, tokens):
    async def read(session, number):
        said = 0
        async with session.post(url + COMPLETIONS, json={**body(number, tokens), "model": "a"}) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        said += len(choice["token_ids"])
        return said

    async def main():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return sum(await asyncio.gather(*(read(session, number) for number in range(streams))))

    assert benchmark.pedantic(lambda: uvloop.run(main()), rounds=3) == streams * tokens


@pytest.mark.parametrize(("count", "output", "stream"), [(1000, 1, False), (100, 100, True)])
def test_jobs_through_the_service(url, benchmark, count, output, stream):
    """Arrival to end: the core's decisions, the driver, the tickets. ``count`` jobs of ``output`` tokens."""

    async def read(ticket):
        while await ticket.next_batch():
            pass

    async def main():
        instance = Instance("i0", Sleepers({"a": AttachedServer(url, HttpBackend)}), {"a": FAST}, "a")
        async with serving_jobs(instance) as service:
            jobs = [job(service, f"q{i}", output=output, stream=stream) for i in range(count)]
            await asyncio.gather(*(read(service.submit(each)) for each in jobs))

    benchmark.pedantic(lambda: uvloop.run(main()), rounds=3)
