"""Under overload that does not end, who is late stands back, but not for ever."""

import numpy as np

from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.types import SloClass
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import SchedulerSettings, make_core, virtual_queues
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload

SLO_S = 2.0
SPAN_S = 600.0
RATE_RPS = 6.5
"""A seventh more than the instance can serve."""


def longest_wait_s(instance, policy="qlm"):
    """Of any request, served or not by the end of SPAN_S of overload; and the share that was in time."""
    rng = np.random.default_rng(1)
    count = int(SPAN_S * RATE_RPS)
    work = Workload(
        ids=[f"r{number:05}" for number in range(count)],
        arrival_s=np.sort(rng.uniform(0, SPAN_S, count)),
        prompt_tokens=rng.integers(1, 400, count),
        output_tokens=rng.integers(1, 120, count),
        max_tokens=np.full(count, 4096),
        models=("a",),
        model_index=np.zeros(count, dtype=int),
        slo_classes=(SloClass("interactive", SLO_S),),
        slo_index=np.zeros(count, dtype=int),
    )
    recorder = RunRecorder([instance])
    core = make_core(policy, [instance], SchedulerSettings())
    config = EngineConfig(max_num_seqs=4)
    simulate(work, [instance], config, core, recorder, solver=InlineSolver(solve), until_s=SPAN_S)
    requests = recorder.requests()
    waited_s = np.where(np.isnan(requests.ttft_s), SPAN_S - requests.arrival_s, requests.ttft_s)
    return float(waited_s.max()), float(np.mean(requests.ttft_s <= SLO_S))


def test_who_was_late_has_a_turn_again(make_instance):
    """Its patience is 60 s, so after 120 s its turns come close together. And most are met at once, where
    earliest deadline first lets all wait alike."""
    longest_s, met = longest_wait_s(make_instance())
    assert longest_s < 4 * virtual_queues.PATIENCE_SLOS * SLO_S
    _, met_by_edf = longest_wait_s(make_instance(), "edf")
    assert met > 4 * met_by_edf


def test_without_turns_the_first_who_was_late_would_wait_for_the_end(make_instance, monkeypatch):
    monkeypatch.setattr(virtual_queues, "PATIENCE_SLOS", 1e9)
    longest_s, _ = longest_wait_s(make_instance())
    assert longest_s > 0.8 * SPAN_S
