"""``qlm-live profile``: measures the engines of a config side by side, and writes their hardware profiles."""

import argparse
import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from qlm_sim.cli.parser import Commands
from qlm_sim.cli.progress import Update, progress, say
from qlm_sim.errors import InputError

if TYPE_CHECKING:
    from live.config import EngineConfig, LiveConfig
    from qlm_sim.calibration.fit import FitResult
    from qlm_sim.models.specs import ModelSpec
    from qlm_sim.validation.request_log import RequestLog


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure the engines of a config and write their hardware profiles",
        description="Start or attach to the engines, which must be idle, measure all of them at the same "
        "time (some minutes), and write for each a profile that its key gpu takes. Engines that share a "
        "machine slow each other as they will in service. Times of swaps are no part of it: they are learnt "
        "from every swap.",
        epilog="examples:\n  qlm-live profile --config live.toml\n"
        "  qlm-live profile --config live.toml --engine e0 --out profiles\n",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the cluster, as for qlm-live serve")
    parser.add_argument(
        "--engine", action="append", metavar="ID", help="only this; repeatable (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the prompts (default: 0)")
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
    if not out.is_dir():
        raise InputError(f"--out: {out} is not a directory")
    with progress(args.quiet) as update:
        logs = asyncio.run(_measure(config, engines, args.seed, update))
    for engine, (log, version) in zip(engines, logs, strict=True):
        say(f"fitting {engine.id}", args.quiet)
        _fit(config, engine, log, version, out / f"{engine.id}.toml")
    return 0


async def _measure(
    config: "LiveConfig", engines: "list[EngineConfig]", seed: int, update: Update
) -> "list[tuple[RequestLog, str | None]]":
    """Each engine's measured requests and its version."""
    from live.build import make_service
    from live.engines.http import HttpBackend
    from live.measure import START_S
    from qlm_sim.calibration.server import Server, sweep

    service = make_service(config)
    await service.start()
    try:
        try:
            await service.wait_up(START_S)
        except TimeoutError:
            raise InputError(f"not all engines were up within {START_S:.0f} s; see the log above") from None

        def measure(engine: "EngineConfig") -> "tuple[RequestLog, str | None]":
            instance = service.engines.instances[engine.id]
            backend = instance.backend
            if not isinstance(backend, HttpBackend):
                raise InputError(f"engine {engine.id}: runs in this process, and is measured over HTTP alone")
            server = Server(backend.url)
            facts = server.facts(None)
            log = sweep(
                server,
                facts,
                vocabulary=_model_spec(config, instance.model).vocab_size,
                seed=seed,
                progress=lambda done, total: update(f"measuring {engine.id}", done, total),
            )
            return log, facts.version

        with ThreadPoolExecutor(len(engines)) as pool:
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(pool, measure, each) for each in engines))
    finally:
        await service.stop()


def _model_spec(config: "LiveConfig", name: str) -> "ModelSpec":
    from dataclasses import replace

    from qlm_sim.models.specs import load_model

    model = next(each for each in config.model if each.name == name)
    return replace(load_model(model.config or model.name), name=name)


def _fit(
    config: "LiveConfig", engine: "EngineConfig", log: "RequestLog", version: str | None, path: Path
) -> None:
    """Fit the engine's profile to its log, and write it."""
    from live.build import DEFAULT_GPU, promise
    from qlm_sim.calibration.factors import with_factors
    from qlm_sim.calibration.fit import Target, fit_factors
    from qlm_sim.calibration.observations import Observation
    from qlm_sim.calibration.profile_file import profile_toml
    from qlm_sim.models.engine_config import EngineConfig as Limits
    from qlm_sim.models.engines import DEFAULT_ENGINE, load_engine
    from qlm_sim.models.hardware import load_gpu

    name = engine.resident or engine.models[0]
    gpu, model = load_gpu(engine.gpu or DEFAULT_GPU), _model_spec(config, name)
    running = DEFAULT_ENGINE if version is None else "vllm-" + ".".join(version.split("+")[0].split(".")[:2])
    limits = Limits(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
    )
    placed = promise(engine, next(each for each in config.model if each.name == name))
    target = Target(model, gpu, engine.tp, load_engine(running), limits, placed)
    result = fit_factors(target, [Observation(log)])
    source = (
        f"{gpu.name} scaled to {len(log):,} requests to engine {engine.id} ({name}, {running}) "
        "by qlm-live profile"
    )
    fitted = with_factors(gpu, model, engine.tp, result.factors, name=path.stem, source=source)
    path.write_text(
        profile_toml(fitted, held_out_mape=result.held_out_mape, comment=source), encoding="utf-8"
    )
    _print(engine.id, name, running, result, path)


def _print(engine: str, model: str, version: str, result: "FitResult", path: Path) -> None:
    held_out = "" if result.held_out_mape is None else f", {result.held_out_mape:.1%} on held-out requests"
    sys.stdout.write(
        f"{engine}: {model} under {version}, {result.times:,} times: mean error {result.shipped_mape:.1%} "
        f"as shipped, {result.mape:.1%} fitted{held_out}\n"
        f"profile: {path}, for the engine's key gpu\n"
    )
