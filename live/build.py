"""Makes the service that a configuration describes."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from live.config import EngineConfig, LiveConfig, ModelConfig
from live.engines.backend import Backend
from live.engines.http import HttpBackend
from live.engines.instance import Instance
from live.engines.residency import Residency, Restarter, Server, Sleepers
from live.engines.supervise import AttachedServer, SupervisedServer
from live.engines.watch import Watch
from live.fake.engine import FakeEngine
from live.fake.server import FakeServer
from live.service import Service
from qlm_sim.core.types import Lso, ModelOnInstance
from qlm_sim.errors import InputError
from qlm_sim.models.deployment import deploy
from qlm_sim.models.engine_config import EngineConfig as EngineLimits
from qlm_sim.models.engines import DEFAULT_ENGINE
from qlm_sim.models.hardware import load_gpu
from qlm_sim.models.specs import ModelSpec, load_model
from qlm_sim.policies import SchedulerSettings

DEFAULT_GPU = "a10"
"""Where no profile is given. How fast the engine really is, is learnt from what it does."""
NO_OFFLOAD_TOKEN_S = 1.0
"""Seconds per token of KV moved to the host and back: so many that it never pays. What is evicted here is
computed again, as far as the engine's prefix cache has lost it."""
GIB = 2**30


def scheduler_settings(config: LiveConfig) -> SchedulerSettings:
    scheduler = config.scheduler
    return SchedulerSettings(
        weights={slo.name: slo.weight for slo in config.slo},
        delta=scheduler.delta,
        replan_interval_s=scheduler.replan_interval_s,
        without=frozenset(map(Lso, scheduler.without)),
        first_token_only=frozenset(slo.name for slo in config.slo if slo.first_token_only),
    )


def make_service(config: LiveConfig) -> Service:
    """Not started yet. Raises InputError."""
    return Service(
        make_instances(config), policy=config.scheduler.policy, settings=scheduler_settings(config)
    )


def make_instances(config: LiveConfig) -> list[Instance]:
    """One for each engine, in their order. Raises InputError, which names the engine."""
    instances = []
    for number, engine in enumerate(config.engine):
        try:
            instances.append(make_instance(engine, config))
        except InputError as error:
            raise InputError(f"engine[{number}]: {error}") from None
    return instances


def on_fakes(config: LiveConfig, speed: float) -> LiveConfig:
    """The same cluster made of fake engines, so many times faster than their profiles."""
    engines = (
        replace(engine, kind="fake", url=None, urls={}, command=None, speed=speed) for engine in config.engine
    )
    return replace(config, engine=tuple(engines))


def make_instance(engine: EngineConfig, config: LiveConfig) -> Instance:
    models = {model.name: model for model in config.model if model.name in engine.models}
    promised = {name: promise(engine, models[name]) for name in engine.models}
    in_host = engine.swap == "sleep" and engine.sleep_level == 1 and len(models) > 1
    return Instance(
        engine.id,
        _residency(engine, models, promised),
        promised,
        engine.resident or engine.models[0],
        watch=Watch(report_s=engine.report_s, stall_s=engine.stall_s, backoff_s=engine.backoff_s),
        host_bytes=int(engine.host_memory_gib * GIB) if in_host else 0,
    )


def promise(engine: EngineConfig, model: ModelConfig) -> ModelOnInstance:
    """What the profile promises; the engine's own word on its capacity comes when it is up."""
    block = engine.block_size
    limits = EngineLimits(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=block,
        num_gpu_blocks=engine.kv_tokens // block if engine.kv_tokens else None,
    )
    spec: ModelSpec = replace(load_model(model.config or model.name), name=model.name)
    promised = deploy(
        spec,
        load_gpu(engine.gpu or DEFAULT_GPU),
        engine.tp,
        limits,
        engine=DEFAULT_ENGINE,
        storage_bytes_per_s=engine.storage_gb_per_s * 1e9,
    )
    longest = min(engine.max_model_len, model.max_model_len or promised.max_model_len)
    return replace(
        promised,
        max_model_len=min(promised.max_model_len, longest),
        kv_restore_token_s=NO_OFFLOAD_TOKEN_S,
    )


def _residency(
    engine: EngineConfig, models: dict[str, ModelConfig], promised: dict[str, ModelOnInstance]
) -> Residency:
    def server(*names: str) -> Server:
        return _server(engine, {name: models[name] for name in names}, promised)

    if engine.swap == "restart":
        return Restarter(server(*models))
    return Sleepers({name: server(name) for name in models}, engine.sleep_level)


def _server(
    engine: EngineConfig, models: dict[str, ModelConfig], promised: dict[str, ModelOnInstance]
) -> Server:
    if engine.kind == "fake":
        engines = {name: partial(_fake, engine, name, promised[name]) for name in models}
        return FakeServer(engines, _connect(engine))
    if engine.kind == "in-process":
        return _in_process(engine, models)
    if engine.command is None:
        (name,) = models
        url = engine.urls.get(name) or engine.url
        assert url is not None
        return AttachedServer(url, _connect(engine))
    return SupervisedServer(
        engine.id,
        engine.command,
        {name: model.path or name for name, model in models.items()},
        _connect(engine),
        env=engine.env,
        log_path=Path(engine.log) if engine.log else None,
    )


def _in_process(engine: EngineConfig, models: dict[str, ModelConfig]) -> Server:
    try:
        from live.engines.in_process import InProcessServer
    except ImportError as error:
        raise InputError(f"in-process engines need vllm in this environment: {error}") from None
    paths = {name: model.path or name for name, model in models.items()}
    return InProcessServer(engine.command or (), paths, engine.env)


def _connect(engine: EngineConfig) -> Callable[[str, str], Backend]:
    key = os.environ.get(engine.engine_key_env) if engine.engine_key_env else None
    return lambda url, model: HttpBackend(url, model, key)


def _fake(engine: EngineConfig, name: str, promised: ModelOnInstance) -> FakeEngine:
    return FakeEngine(
        name,
        promised,
        EngineLimits(block_size=engine.block_size),
        time_scale=1 / engine.speed,
        mean_output_tokens=engine.mean_output_tokens,
    )
