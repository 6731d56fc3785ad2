"""The contract of the engines' port, on the simulated cluster and on fake engines over HTTP.

tests/vllm runs the same scenarios on real vLLM.
"""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from contract.laws import check_laws, check_outcome
from contract.live_world import play, prompt_of
from contract.scenarios import SCENARIOS, Run, Scenario, ScriptedCore
from fakes import PROFILE, fake_instance

from live.fake.language import generate, words
from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.types import InstanceSpec, SloClass
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.workload.workload import Workload

LONGEST = 1024


def in_simulation(scenario: Scenario) -> Run:
    profile = replace(PROFILE, max_num_seqs=scenario.max_num_seqs, max_model_len=LONGEST)
    instances = [
        InstanceSpec(name, dict.fromkeys(scenario.models, profile), scenario.models[0], 1 << 40, ())
        for name in scenario.instances
    ]
    asks = scenario.asks
    workload = Workload(
        ids=[ask.id for ask in asks],
        arrival_s=np.zeros(len(asks)),
        prompt_tokens=np.array([ask.prompt_tokens for ask in asks]),
        output_tokens=np.array([ask.output_tokens for ask in asks]),
        max_tokens=np.array([ask.output_tokens for ask in asks]),
        models=tuple(scenario.models),
        model_index=np.array([list(scenario.models).index(ask.model) for ask in asks]),
        slo_classes=(SloClass("all", 60.0),),
        slo_index=np.zeros(len(asks), dtype=np.int64),
    )
    run = Run()
    simulate(workload, instances, EngineConfig(), ScriptedCore(scenario.script()), run, until_s=600.0)
    return run


def on_fakes(scenario: Scenario, swap: str) -> Run:
    made = [
        fake_instance(
            name, scenario.models, swap=swap, max_num_seqs=scenario.max_num_seqs, max_model_len=LONGEST
        )
        for name in scenario.instances
    ]
    crash = made[0][1]["a"].crash if "crash" in scenario.needs else None
    run = asyncio.run(play(scenario, [instance for instance, _ in made], crash=crash))
    for ask in scenario.asks:
        run.expected[ask.id] = "".join(
            words(generate(ask.model, prompt_of(ask), ask.output_tokens, 1e9, True))
        )
    return run


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_simulated_cluster(scenario: Scenario) -> None:
    if "crash" in scenario.needs:
        pytest.skip("simulated engines do not crash")
    run = in_simulation(scenario)
    check_laws(run)
    check_outcome(scenario, run)


@pytest.mark.parametrize("swap", ["sleep", "restart"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_fake_engines(scenario: Scenario, swap: str) -> None:
    if swap == "restart" and not scenario.needs:
        pytest.skip("the same as with sleep: nothing is swapped")
    run = on_fakes(scenario, swap)
    check_laws(run)
    check_outcome(scenario, run)
    assert run.texts.keys() >= scenario.finishing
