"""Services on fake engines, for tests: quick ones, whose every iteration takes a few milliseconds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from live.engines.http import HttpBackend
from live.engines.instance import Instance
from live.engines.residency import Restarter, Sleepers
from live.engines.watch import Watch
from live.fake.engine import FakeEngine
from live.fake.language import generate, tokenize, words
from live.fake.server import FakeServer
from live.jobs import CHAT, COMPLETIONS, Delta, Job, Output
from live.service import Listener, Service
from qlm_sim.core.types import ModelOnInstance, Request
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import SchedulerSettings

WATCH = Watch(report_s=0.05, answer_s=2.0, stall_s=1.5, retry_s=0.01, backoff_s=0.05)


@dataclass(frozen=True)
class QuickStep:
    """An iteration takes 2 ms and 2 µs per token."""

    base: float = 2e-3
    seq_s: float = 0.0
    kv_token_s: float = 0.0
    prefill_pair_s: float = 0.0

    def base_s(self, tokens: int) -> float:
        return self.base + 2e-6 * tokens


PROFILE = ModelOnInstance(
    step=QuickStep(),
    kv_capacity_tokens=16_000,
    max_num_seqs=4,
    max_num_batched_tokens=2048,
    max_model_len=4096,
    weight_bytes=10**9,
    kv_bytes_per_token=10**5,
    swap_in_s=0.05,
    load_s=0.2,
    kv_restore_token_s=1e-6,
)


def fake_instance(
    name: str = "i0",
    models: Sequence[str] = ("a",),
    *,
    swap: str = "sleep",
    watch: Watch = WATCH,
    profiles: Mapping[str, ModelOnInstance] | None = None,
    **changes: float,
) -> tuple[Instance, dict[str, FakeServer]]:
    """An instance with its fake servers by model (one for all with ``swap = "restart"``)."""
    profile = replace(PROFILE, **changes)  # type: ignore[arg-type]
    promised = dict.fromkeys(models, profile) | dict(profiles or {})

    def connect(url: str, model: str) -> HttpBackend:
        return HttpBackend(url, model)

    def make(model: str) -> FakeEngine:
        return FakeEngine(model, promised[model], EngineConfig())

    makers = {model: (lambda model=model: make(model)) for model in models}
    if swap == "restart":
        server = FakeServer(makers, connect)
        return Instance(name, Restarter(server), promised, models[0], watch=watch), dict.fromkeys(
            models, server
        )
    servers = {model: FakeServer({model: makers[model]}, connect) for model in models}
    host = 1 << 40 if len(models) > 1 else 0
    return Instance(name, Sleepers(servers), promised, models[0], watch=watch, host_bytes=host), servers


@contextlib.asynccontextmanager
async def serving_jobs(
    *instances: Instance,
    policy: str = "qlm",
    settings: SchedulerSettings | None = None,
    listener: Listener | None = None,
) -> AsyncIterator[Service]:
    """``listener`` is told every settle, from the first on."""
    service = Service(instances, policy=policy, settings=settings, solver_process=False)
    if listener is not None:
        service.add_listener(listener)
    await service.start()
    await service.wait_up(10.0)
    try:
        yield service
    finally:
        await service.stop()


def job(
    service: Service,
    name: str,
    *,
    model: str = "a",
    output: int = 20,
    chat: bool = False,
    stream: bool = True,
    slo_class: str = "interactive",
    slo_s: float = 20.0,
    pinned: bool = False,
    **body: object,
) -> Job:
    prompt = f"This is what {name} has to say about it: "
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    request = Request(name, model, slo_class, slo_s, service.now(), len(tokens_of(name, chat)), output)
    return Job(
        request,
        CHAT if chat else COMPLETIONS,
        {**asked, "stream": stream, "max_tokens": output, "temperature": 0, "ignore_eos": True, **body},
        pinned=pinned,
    )


def tokens_of(name: str, chat: bool = False) -> list[int]:
    prompt = f"This is what {name} has to say about it: "
    return tokenize(f"user: {prompt}\n" if chat else prompt)


def expected_text(name: str, model: str = "a", output: int = 20, chat: bool = False) -> str:
    """What an engine that is never disturbed says."""
    return "".join(words(generate(model, tokens_of(name, chat), output, 1e9, True)))


def text_of(outputs: Sequence[Output]) -> str:
    pieces = []
    for output in outputs:
        if isinstance(output, Delta):
            delta = output.choice.get("delta")
            pieces.append(delta.get("content", "") if delta is not None else output.choice["text"])
    return "".join(pieces)


async def read(ticket: object, timeout_s: float = 20.0) -> list[Output]:
    async with asyncio.timeout(timeout_s):
        return [output async for output in ticket]  # type: ignore[attr-defined]
