"""``qlm-live profile``: measures the engines of a config side by side, and writes their hardware profiles.

Through a service for each: what hands out work and takes in tokens may share the cores of the engines.
"""

import argparse
import asyncio
import math
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from qlm_sim.cli.parser import Commands
from qlm_sim.cli.progress import Update, progress, say
from qlm_sim.errors import InputError
from qlm_sim.processes import Report, run_jobs

if TYPE_CHECKING:
    from live.config import EngineConfig, LiveConfig
    from live.engines.instance import Instance
    from live.service import Service
    from qlm_sim.models.specs import ModelSpec
    from qlm_sim.validation.request_log import RequestLog


SWAP_ROUNDS = 2
TOKENS = range(100, 1_000)
"""Ids that every model knows, for what is asked for the sake of swaps."""
ANSWER_S = 300.0
"""A request that is not answered by then will not be."""


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure the engines of a config and write their hardware profiles",
        description="Start or attach to the engines, which must be idle, measure all of them at the same "
        "time (some minutes), and write for each a profile that its key gpu takes. Engines that share a "
        "machine slow each other as they will in service. Engines with several models are made to swap too.",
        epilog="examples:\n  qlm-live profile --config live.toml\n"
        "  qlm-live profile --config live.toml --engine e0 --out profiles\n",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the cluster, as for qlm-live serve")
    parser.add_argument(
        "--engine", action="append", metavar="ID", help="only this; repeatable (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the prompts (default: 0)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="begin no further round of requests after so long; one is made in any case (default: 300)",
    )
    parser.add_argument(
        "--shared-cores",
        action="store_true",
        help="engines share their cores with their HTTP servers or with this gateway, as vLLM on CPU does: "
        "measure for how long each request as such holds its engine up",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", default=".", metavar="DIR", help="where <engine>.toml goes (default: here)")
    output.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from live.config import load_config

    config = load_config(args.config)
    ids = [each.id for each in config.engine]
    for name in args.engine or ():
        if name not in ids:
            raise InputError(f"--engine: found {name!r}; known: {', '.join(ids)}")
    engines = [each for each in config.engine if each.id in (args.engine or ids)]
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--out: {out} is not a directory") from None
    except OSError as error:
        raise InputError(f"--out: {out}: {error.strerror}") from None
    with progress(args.quiet) as update:
        measured = asyncio.run(_measure(config, engines, args.seed, args.seconds, args.shared_cores, update))
    say(f"fitting {', '.join(each.id for each in engines)}", args.quiet)
    fits = [
        _Fit(config, engine, each, args.shared_cores, out / f"{engine.id}.toml")
        for engine, each in zip(engines, measured, strict=True)
    ]
    sys.stdout.writelines(run_jobs(fits, os.cpu_count() or 1, lambda *_: None))
    return 0


@dataclass(frozen=True, slots=True)
class _Measured:
    """What an engine did."""

    log: "RequestLog"
    version: str | None
    later_s: float | None
    """How much longer its swaps took than promised, on average; None where it never swaps."""


async def _measure(
    config: "LiveConfig",
    engines: "list[EngineConfig]",
    seed: int,
    most_s: float,
    shared: bool,
    update: Update,
) -> list[_Measured]:
    from live.build import make_service
    from live.engines.http import HttpBackend
    from live.measure import START_S, with_policy
    from qlm_sim.calibration.server import InStep, Server, plan_for, sweep

    services = [make_service(replace(with_policy(config, "vllm"), engine=(each,))) for each in engines]
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        for service in services:
            stack.push_async_callback(service.stop)
            await service.start()
        try:
            await asyncio.gather(*(service.wait_up(START_S) for service in services))
        except TimeoutError:
            raise InputError(f"not all engines were up within {START_S:.0f} s; see the log above") from None
        instances = [
            service.engines.instances[each.id] for service, each in zip(services, engines, strict=True)
        ]
        facts = []
        for instance in instances:
            if not isinstance(instance.backend, HttpBackend):
                raise InputError(
                    f"engine {instance.id}: runs in this process, and is measured over HTTP alone"
                )
            facts.append(await loop.run_in_executor(None, Server(instance.backend.url).facts, None))
        limits = [instance.models[instance.model] for instance in instances]
        plan = plan_for(
            min(each.max_num_seqs for each in limits),
            min(each.max_model_len for each in limits),
            most_s,
            shared=shared,
        )
        in_step = InStep(len(engines), most_s)

        def measure(number: int) -> "RequestLog":
            name, model = engines[number].id, instances[number].model
            return sweep(
                _Through(services[number], loop),
                replace(facts[number], served_model=model),
                vocabulary=_model_spec(config, model).vocab_size,
                seed=seed + number,
                plan=plan,
                in_step=in_step,
                progress=lambda done, total: update(f"measuring {name}", done, total),
            )

        with ThreadPoolExecutor(len(engines)) as pool:
            logs = await asyncio.gather(
                *(loop.run_in_executor(pool, measure, n) for n in range(len(engines)))
            )
        prompt = plan.prompts[-1]
        later = await asyncio.gather(
            *(
                _swaps_later_s(_Through(service, loop), instance, prompt, update)
                for service, instance in zip(services, instances, strict=True)
            )
        )
        return [
            _Measured(log, each.version, later_s)
            for log, each, later_s in zip(logs, facts, later, strict=True)
        ]


class _Through:
    """A service as what a sweep asks, from other threads than that of its loop."""

    def __init__(self, service: "Service", loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop
        self._numbers = count()

    def complete(self, model: str, prompt: list[int], output_tokens: int) -> tuple[float, float, float, int]:
        asked = self.answer(model, prompt, output_tokens)
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result(ANSWER_S)

    async def answer(
        self, model: str, prompt: list[int], output_tokens: int
    ) -> tuple[float, float, float, int]:
        from live.jobs import COMPLETIONS, Delta, Finished, Job
        from qlm_sim.core.types import Request

        body = {
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        request = Request(
            id=f"measured-{next(self._numbers)}",
            model=model,
            slo_class="measured",
            slo_s=ANSWER_S,
            arrived_at=self._service.now(),
            prompt_tokens=len(prompt),
            max_tokens=output_tokens,
        )
        sent = time.perf_counter()
        first = last = math.nan
        async for output in self._service.submit(Job(request, COMPLETIONS, body)):
            if isinstance(output, Delta):
                last = time.perf_counter() - sent
                first = last if math.isnan(first) else first
            elif isinstance(output, Finished):
                return sent, first, last, output.output_tokens
            else:
                raise InputError(f"a request of {len(prompt)} tokens failed: {output}")
        raise AssertionError("a ticket ended without an end")


async def _swaps_later_s(ask: "_Through", instance: "Instance", prompt: int, update: Update) -> float | None:
    """Have every model in turn answer a prompt of so many tokens, twice: once it must be loaded for that.

    The difference is what a swap costs: the first steps of a model that has just been loaded are slow too.
    After a round that only warms up.
    """
    home, promised = instance.model, dict(instance.models)
    others = [name for name in promised if name != home]
    if not others:
        return None
    later = []
    for number in range(SWAP_ROUNDS + 1):
        for model in (*others, home):
            first_s = []
            for _ in range(2):
                fresh = random.choices(TOKENS, k=prompt)
                first_s.append((await ask.answer(model, fresh, 2))[1])
            before = promised[model]
            promised_s = before.swap_in_s if instance.spec.host_bytes else before.load_s
            if number:
                later.append(first_s[0] - first_s[1] - promised_s)
        update(f"swapping on {instance.id}", number + 1, SWAP_ROUNDS + 1)
    return sum(later) / len(later)


def _model_spec(config: "LiveConfig", name: str) -> "ModelSpec":
    from dataclasses import replace

    from qlm_sim.models.specs import load_model

    model = next(each for each in config.model if each.name == name)
    return replace(load_model(model.config or model.name), name=name)


@dataclass(frozen=True, slots=True)
class _Fit:
    """Fits an engine's profile to its log, and writes it to ``path``: a job."""

    config: "LiveConfig"
    engine: "EngineConfig"
    measured: _Measured
    shared: bool
    path: Path

    def __call__(self, report: Report) -> str:
        """What came of it, for people."""
        from live.build import DEFAULT_GPU, promise
        from qlm_sim.calibration.factors import with_factors, with_swaps
        from qlm_sim.calibration.fit import Target, fit_factors
        from qlm_sim.calibration.observations import Observation
        from qlm_sim.calibration.profile_file import profile_toml
        from qlm_sim.models.engine_config import EngineConfig as Limits
        from qlm_sim.models.engines import DEFAULT_ENGINE, load_engine
        from qlm_sim.models.hardware import load_gpu

        engine, config = self.engine, self.config
        log, version, later_s = self.measured.log, self.measured.version, self.measured.later_s
        name = engine.resident or engine.models[0]
        gpu, model = load_gpu(engine.gpu or DEFAULT_GPU), _model_spec(config, name)
        running = DEFAULT_ENGINE
        if version is not None:
            running = "vllm-" + ".".join(version.split("+")[0].split(".")[:2])
        limits = Limits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            block_size=engine.block_size,
        )
        placed = promise(engine, next(each for each in config.model if each.name == name))
        target = Target(model, gpu, engine.tp, load_engine(running), limits, placed, self.shared)
        result = fit_factors(target, [Observation(log)])
        source = (
            f"{gpu.name} scaled to {len(log):,} requests to engine {engine.id} ({name}, {running}) "
            "by qlm-live profile"
        )
        fitted = with_factors(gpu, model, engine.tp, result.factors, name=self.path.stem, source=source)
        if later_s is not None:
            fitted = with_swaps(fitted, later_s, source)
        text = profile_toml(fitted, held_out_mape=result.held_out_mape, comment=source)
        self.path.write_text(text, encoding="utf-8")
        held_out = (
            "" if result.held_out_mape is None else f", {result.held_out_mape:.1%} on held-out requests"
        )
        said = [
            f"{engine.id}: {name} under {running}, {result.times:,} times: mean error "
            f"{result.shipped_mape:.1%} as shipped, {result.mape:.1%} fitted{held_out}",
            f"profile: {self.path}, for the engine's key gpu",
        ]
        if fitted.intake_s is not None:
            low, high = result.bounds["intake"]
            said.append(
                f"requests: each holds the engine up for {1e3 * fitted.intake_s.value:.1f} ms "
                f"(95 %: {low:.1f} to {high:.1f})"
            )
        if later_s is not None:
            said.append(f"swaps: {later_s:+.2f} s a swap, as to what was promised; now in the profile")
        return "\n".join(said) + "\n"
