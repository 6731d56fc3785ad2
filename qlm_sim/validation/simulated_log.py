"""Replays a real log through the simulated engine: the same requests, at the same times, of the same lengths.

Knows no measured time: what it gives can be held against one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.types import InstanceSpec, ModelOnInstance, SloClass
from qlm_sim.errors import InputError
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.run import conclude
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.offered_load import demands, offered_load, with_offered_load
from qlm_sim.policies import SchedulerSettings, make_core
from qlm_sim.validation.request_log import Floats, RequestLog
from qlm_sim.workload.readers import numbered_ids
from qlm_sim.workload.workload import Workload

_MODEL = "model"


@dataclass(frozen=True)
class SimulatedLog:
    """A log's requests as simulated, in its order. ``saturation``: the run's verdict, see metrics."""

    times: Mapping[str, Floats]
    """ttft_s, tpot_s (NaN for outputs of one token) and e2e_s."""
    offered_load: float | None
    saturated: bool
    saturation: str
    preemptions: int
    unfinished: int


def simulate_log(
    log: RequestLog,
    placed: ModelOnInstance,
    config: EngineConfig,
    *,
    request_s: float,
    instances: int = 1,
) -> SimulatedLog:
    """Serve the log's requests on like instances, first come, first served, behind a least-loaded router.

    ``request_s``: seconds that each request spends in the server outside of its engine; it reaches the
    engine that much later. Raises InputError for a request that the engine could not have served.
    """
    _check_lengths(log, placed)
    rows = len(log)
    index = np.zeros(rows, dtype=np.int64)
    workload = Workload(
        ids=numbered_ids(rows),
        arrival_s=log.arrival_s + request_s,
        prompt_tokens=log.prompt_tokens,
        output_tokens=log.output_tokens,
        max_tokens=log.output_tokens,
        models=(_MODEL,),
        model_index=index,
        slo_classes=(SloClass("log", None),),
        slo_index=index,
    )
    specs = [
        InstanceSpec(
            id=f"engine-{number}",
            models={_MODEL: placed},
            resident=_MODEL,
            host_bytes=placed.weight_bytes,
            host_models=(_MODEL,),
        )
        for number in range(instances)
    ]
    recorder = RunRecorder(specs)
    end = simulate(
        workload,
        specs,
        replace(config, scheduling_policy="fcfs"),
        make_core("vllm", specs, SchedulerSettings()),
        recorder,
    )
    run = conclude("vllm", recorder, workload.slo_classes, end.ended_at)
    run = with_offered_load(run, offered_load(demands(workload), specs))
    requests, summary = run.requests, run.summary
    return SimulatedLog(
        times={
            "ttft_s": requests.ttft_s + request_s,
            "tpot_s": requests.tpot_s,
            "e2e_s": requests.e2e_s + request_s,
        },
        offered_load=summary["offered_load"],
        saturated=summary["saturated"],
        saturation=summary["saturation"],
        preemptions=summary["preemptions"],
        unfinished=summary["unfinished"] + summary["rejected"],
    )


def dealt_anew(log: RequestLog, seed: int) -> RequestLog:
    """The same load on another day: the log's requests, dealt out by chance among its arrivals. Measured
    times go with them, and tell which have one."""
    order = np.random.default_rng(seed).permutation(len(log))
    return replace(
        log,
        prompt_tokens=log.prompt_tokens[order],
        output_tokens=log.output_tokens[order],
        measured={name: times[order] for name, times in log.measured.items()},
    )


def _check_lengths(log: RequestLog, placed: ModelOnInstance) -> None:
    lengths = log.prompt_tokens + log.output_tokens
    row = int(lengths.argmax())
    if lengths[row] > placed.max_model_len:
        raise InputError(
            f"{log.path}: the request that arrives at {log.arrival_s[row]:g} s has {lengths[row]} tokens, "
            f"and the engine takes {placed.max_model_len}: raise --max-model-len or --num-gpu-blocks to what "
            "the real engine had"
        )
