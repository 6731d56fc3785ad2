"""Running a workload on the live cluster, and in simulation on instances that are as the live ones were."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from live.build import make_service, scheduler_settings
from live.config import LiveConfig
from live.load import Offered, offer
from live.run_log import RunLog, as_they_are
from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.types import InstanceSpec
from qlm_sim.errors import InputError
from qlm_sim.event_log import EventLogWriter, LogHeader
from qlm_sim.metrics.run import PolicyRun, conclude
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.engines import DEFAULT_ENGINE, load_engine
from qlm_sim.policies import make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload

START_S = 300.0
"""Engines that are not up by then will not be."""


@dataclass(frozen=True)
class LiveRun:
    """One policy's run on real engines."""

    run: PolicyRun
    instances: tuple[InstanceSpec, ...]
    """As they were when the first request came, before any warm-up."""
    slowness: Mapping[str, float]
    """By instance: its seconds per second of the profile, as the scheduler had learnt in the warm-up."""
    offered: Offered
    cpu_s: float
    """What scheduler, solver and load generator took of the CPUs, warm-up included."""


def with_policy(config: LiveConfig, policy: str) -> LiveConfig:
    return replace(config, scheduler=replace(config.scheduler, policy=policy))


def log_header(config: LiveConfig) -> LogHeader:
    """Of the event log of a service that is made from ``config``: its instances come up as events."""
    return LogHeader(
        policy=config.scheduler.policy,
        settings=scheduler_settings(config),
        instances=(),
        slo_classes=config.slo,
    )


async def run_live(
    config: LiveConfig,
    workload: Workload,
    vocabulary: Mapping[str, int],
    *,
    seed: int,
    warm_up_s: float = 0.0,
    record: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LiveRun:
    """Offer the workload to the cluster of ``config``, once all of its engines are up. Raises InputError.

    What arrives in the first ``warm_up_s`` is served as all else, and is no part of the run.
    """
    began_cpu_s = _cpu_s()
    service = make_service(config)
    events = None if record is None else EventLogWriter(record, log_header(config))
    if events is not None:
        service.add_listener(events.record)
    await service.start()
    try:
        try:
            await service.wait_up(START_S)
        except TimeoutError:
            raise InputError(f"not all engines were up within {START_S:.0f} s; see the log above") from None
        instances = as_they_are(service.core)
        log = RunLog(service.core, service.now() + warm_up_s)
        service.add_listener(log.record)
        offered = await offer(service, workload, vocabulary, seed=seed, progress=progress)
    finally:
        await service.stop()
        if events is not None:
            events.close()
    policy = config.scheduler.policy
    run = conclude(policy, log.recorder, config.slo, offered.ended_at - warm_up_s, log.plans)
    return LiveRun(run, instances, log.slowness, offered, _cpu_s() - began_cpu_s)


def _cpu_s() -> float:
    """Of this process, and of those that it started and that are over."""
    return sum(os.times()[:4])


@dataclass(frozen=True)
class SimulatedRun:
    """The same run on simulated engines."""

    run: PolicyRun
    slowness: Mapping[str, float]
    """As a LiveRun's."""
    perturb: Mapping[str, float]
    """By instance: how many times as slow as its profile it was simulated."""


def run_simulated(
    config: LiveConfig,
    workload: Workload,
    instances: tuple[InstanceSpec, ...],
    warm_up_s: float = 0.0,
    perturb: Mapping[str, float] | None = None,
) -> SimulatedRun:
    """The same requests at the same times, on simulated instances, which are as their profiles say where
    ``perturb`` has no other speed for them. Prefixes are cached, as vLLM does unless told otherwise: what was
    evicted and comes back finds its own. Orders take their way, as over HTTP."""
    engine = EngineConfig(
        block_size=config.engine[0].block_size,
        enable_prefix_caching=True,
        # As vLLM does from 0.19 on.
        scheduler_reserve_full_isl=any(each.kind != "fake" for each in config.engine),
    )
    policy = config.scheduler.policy
    core = make_core(policy, instances, replace(scheduler_settings(config), forecasts=True))
    log = RunLog(core, warm_up_s)
    end = simulate(
        workload,
        instances,
        engine,
        core,
        log,
        solver=InlineSolver(solve),
        order_s=load_engine(DEFAULT_ENGINE).request_s.value,
        perturb=perturb or {},
    )
    run = conclude(policy, log.recorder, workload.slo_classes, end.ended_at - warm_up_s, log.plans)
    return SimulatedRun(run, log.slowness, perturb or dict.fromkeys(log.slowness, 1.0))


def run_as_fast(
    config: LiveConfig, workload: Workload, live: LiveRun, warm_up_s: float
) -> tuple[SimulatedRun, SimulatedRun]:
    """The simulation of a live run, by the profiles, and with engines as fast as they were in its warm-up.

    Machines are not as fast from one minute to the next, nor as when they were profiled. What the scheduler
    learnt in the live warm-up, beside what it learns in the simulated one, tells how slow engines were;
    nothing that came later has a part in it. Without a warm-up both are the same.
    """
    profiled = run_simulated(config, workload, live.instances, warm_up_s)
    if not warm_up_s:
        return profiled, profiled
    slower = {name: live.slowness.get(name, each) / each for name, each in profiled.slowness.items()}
    return profiled, run_simulated(config, workload, live.instances, warm_up_s, slower)
