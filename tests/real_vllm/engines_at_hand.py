"""Real vLLM engines on CPU: how they are started, and what instances are made of them."""

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fakes import QuickStep

from live.engines.http import HttpBackend
from live.engines.instance import Instance
from live.engines.residency import Residency, Sleepers
from live.engines.supervise import AttachedServer, SupervisedServer
from live.engines.watch import Watch
from qlm_sim.core.types import ModelOnInstance

HERE = Path(__file__).parent
FLAGS = [
    *("--enforce-eager", "--distributed-executor-backend", "uni"),
    *("--kv-cache-memory-bytes", "32M", "--block-size", "32", "--dtype", "float32"),
    *("--max-model-len", "1024", "--max-num-seqs", "4", "--max-num-batched-tokens", "1024"),
]
SERVE = [
    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "{port}"),
    *("--model", "{model}", "--served-model-name", "{name}", "--enable-prompt-tokens-details"),
    *("--worker-cls", "sleeping_worker.SleepingCPUWorker", *FLAGS),
]
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for sleep and server_info
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
}
WATCH = Watch(report_s=0.5, stall_s=20.0, backoff_s=0.2)
PROFILE = ModelOnInstance(
    step=QuickStep(base=5e-3),
    kv_capacity_tokens=1,  # the engines tell theirs
    max_num_seqs=4,
    max_num_batched_tokens=1024,
    max_model_len=1024,
    weight_bytes=6_400_000,
    kv_bytes_per_token=1536,
    swap_in_s=1.0,
    load_s=30.0,
    kv_restore_token_s=1e-5,
)
T = TypeVar("T")


class Engines:
    """The engines that are up, and the event loop in which all of it lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = asyncio.new_event_loop()
        self.paths = {"a": str(folder / "a"), "b": str(folder / "b")}
        self.servers: dict[str, SupervisedServer] = {}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def new_server(self, name: str) -> SupervisedServer:
        log = self.folder / f"{name}.log"
        return SupervisedServer(
            name, SERVE, self.paths, HttpBackend, env=ENV, log_path=log, start_timeout_s=200
        )

    async def start(self) -> None:
        self.servers = {model: self.new_server(model) for model in ("a", "b")}
        await asyncio.gather(*(server.start(model) for model, server in self.servers.items()))

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop(kill=False) for server in self.servers.values()))

    def attached(self, name: str, *models: str) -> Instance:
        """An instance of the servers that are up already: one model each, or several that sleep in turn."""
        servers = {model: AttachedServer(self.servers[model].url, HttpBackend) for model in models}
        return instance(name, Sleepers(servers), models)


async def wake(engines: Engines, model: str) -> str:
    """The URL of the model's server, which is awake."""
    backend = engines.servers[model].backend
    if await backend.asleep():
        await backend.wake_up(1)
    return engines.servers[model].url


def instance(name: str, residency: Residency, models: tuple[str, ...] = ("a",)) -> Instance:
    host = 1 << 34 if len(models) > 1 else 0
    promised = dict.fromkeys(models, PROFILE)
    return Instance(name, residency, promised, models[0], watch=WATCH, host_bytes=host)


class KeptServer:
    """A server that is started and stopped elsewhere."""

    def __init__(self, server: Any) -> None:
        self.backend = server.backend

    async def start(self, model: str) -> None:
        await self.backend.probe()

    async def stop(self, *, kill: bool) -> None:
        pass

    def when_gone(self, gone: Any) -> None:
        pass
