"""Live and simulated: the same core decides the same on the same events."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from fakes import PROFILE, fake_instance, job, read, serving_jobs

from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.actions import Pull, SwapModel
from qlm_sim.core.events import InstanceDown
from qlm_sim.core.types import InstanceSpec, SloClass
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload


@pytest.mark.parametrize("policy", ["vllm", "edf", "shepherd", "qlm"])
def test_a_fresh_core_decides_as_the_live_one_did(policy):
    settles = []

    def record(now, events, actions):
        settles.append((now, list(events), list(actions)))

    async def main():
        (one, servers), (two, _) = (fake_instance(name, ("a", "b")) for name in ("i0", "i1"))
        async with serving_jobs(one, two, policy=policy, listener=record) as service:
            tickets = [
                service.submit(
                    job(
                        service,
                        f"r{i:02}",
                        model="aab"[i % 3],
                        output=60 + 3 * i,
                        slo_class="interactive" if i % 2 else "batch",
                        slo_s=2.0 if i % 2 else 600.0,
                    )
                )
                for i in range(24)
            ]
            await asyncio.sleep(0.15)
            service.cancel("r23")
            await servers["a"].crash()
            for ticket in tickets:
                await read(ticket, 60.0)

    asyncio.run(main())
    assert any(isinstance(event, InstanceDown) for _, events, _ in settles for event in events)
    fresh = make_core(policy, [], SchedulerSettings(forecasts=True))
    for now, events, actions in settles:
        assert fresh.handle(now, events) == actions, f"at {now}"


@pytest.mark.parametrize(
    "policy", [name for name, each in POLICIES.items() if name != "static" and not each.told]
)
def test_both_worlds_send_and_swap_in_the_same_order(policy):
    """Sixteen requests at once, of two models, whose lengths are far apart: no decision hangs on a hair."""
    count, models = 16, ("a", "b")
    rows = [(f"r{i:02}", models[i % 4 == 3], 8 + 24 * (i % 4), 400.0 + 10 * i) for i in range(count)]

    def orders(log):
        return [
            (type(action).__name__, getattr(action, "request_id", None) or action.model)
            for action in log
            if isinstance(action, Pull | SwapModel)
        ]

    live = []

    async def main():
        instance, _ = fake_instance("i0", models)
        async with serving_jobs(instance, policy=policy) as service:
            service.add_listener(lambda now, events, actions: live.extend(actions))
            jobs = [
                job(service, n, model=m, output=out, slo_class=f"s{slo}", slo_s=slo)
                for n, m, out, slo in rows
            ]
            for ticket in [service.submit(each) for each in jobs]:
                await read(ticket, 60.0)
        return [each.request.prompt_tokens for each in jobs]

    prompts = asyncio.run(main())
    slos = tuple(SloClass(f"s{slo}", ttft_s=slo) for *_, slo in rows)
    workload = Workload(
        ids=[row[0] for row in rows],
        arrival_s=np.zeros(count),
        prompt_tokens=np.array(prompts),
        output_tokens=np.array([row[2] for row in rows]),
        max_tokens=np.array([row[2] for row in rows]),
        models=models,
        model_index=np.array([models.index(row[1]) for row in rows]),
        slo_classes=slos,
        slo_index=np.arange(count),
    )
    profile = replace(PROFILE, kv_capacity_tokens=16_000)
    spec = InstanceSpec("i0", dict.fromkeys(models, profile), "a", 1 << 40, models)
    simulated = []

    class Log:
        def record(self, now, events, actions):
            simulated.extend(actions)

    core = make_core(policy, [spec], SchedulerSettings(forecasts=True))
    simulate(workload, [spec], EngineConfig(), core, Log(), solver=InlineSolver(solve), until_s=600.0)
    assert orders(live) == orders(simulated)
