"""The event log is the truth: fed to a fresh core, it gives every decision again."""

import numpy as np
import pytest

from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.types import SloClass
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload


class Log:
    def __init__(self):
        self.settles = []

    def record(self, now, events, actions):
        self.settles.append((now, events, actions))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "clairvoyant"])
def test_a_fresh_core_decides_as_the_log_says(policy, make_instance):
    rng = np.random.default_rng(11)
    models = ("a", "b", "c")
    slos = (SloClass("interactive", 5.0), SloClass("batch", 600.0))
    work = Workload(
        ids=[f"r{i:05}" for i in range(300)],
        arrival_s=np.cumsum(rng.exponential(0.4, 300)),
        prompt_tokens=rng.integers(1, 400, 300),
        output_tokens=rng.integers(1, 120, 300),
        max_tokens=np.full(300, 4096),
        models=models,
        model_index=rng.integers(0, 3, 300),
        slo_classes=slos,
        slo_index=rng.integers(0, 2, 300),
    )
    instances = [make_instance(name, models) for name in ("i0", "i1")]
    log = Log()
    core = make_core(policy, instances, SchedulerSettings())
    simulate(
        work, instances, EngineConfig(max_num_seqs=4), core, log, solver=InlineSolver(solve), until_s=2e3
    )
    assert any(actions for _, _, actions in log.settles)
    fresh = make_core(policy, instances, SchedulerSettings())
    for now, events, actions in log.settles:
        assert fresh.handle(now, events) == actions, f"at {now}"
