"""How many requests per second a whole simulated cluster serves: core, policy, recorder, solver, engines.

The yardstick is Llama-2-7B on four A100-80 at 24 requests/s. Lengths are those of the Azure conversation
trace (input and output together at most 4,096) where QLM_DATA or ../shared has it, else lognormal
of nearly the same means; extra_info says which.
"""

import csv
import os
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.ids import Ids
from qlm_sim.core.types import InstanceSpec, SloClass
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.models.deployment import deploy
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.hardware import load_gpu
from qlm_sim.models.specs import load_model
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload

LONGEST = 4096
RATE_PER_INSTANCE_RPS = 6.0
SHARED = Path(os.environ.get("QLM_DATA", Path(__file__).parents[3] / "shared"))
AZURE = SHARED / "data/azure_llm_2023/AzureLLMInferenceTrace_conv.csv"


def requests(count: int, instances: int) -> Workload:
    rng = np.random.default_rng(0)
    if AZURE.exists():
        with AZURE.open() as file:
            rows = [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in csv.DictReader(file)]
        lengths = np.array([row for row in rows if sum(row) <= LONGEST and min(row) > 0])
        prompt, output = lengths[rng.integers(len(lengths), size=count)].T
    else:
        prompt = np.clip(rng.lognormal(np.log(959) - 0.5, 1.0, count), 8, 3500).astype(int)
        output = np.clip(rng.lognormal(np.log(283) - 0.32, 0.8, count), 2, LONGEST - prompt).astype(int)
    return Workload(
        ids=Ids(f"r{number:0{len(str(count - 1))}}" for number in range(count)),
        arrival_s=np.cumsum(rng.exponential(1 / (RATE_PER_INSTANCE_RPS * instances), count)),
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=output.astype(np.int32),
        max_tokens=(LONGEST - prompt).astype(np.int32),
        models=("m",),
        model_index=np.zeros(count, dtype=np.int32),
        slo_classes=(SloClass("interactive", ttft_s=20.0),),
        slo_index=np.zeros(count, dtype=np.int32),
    )


def loop(policy: str, trace: Workload, count: int) -> tuple[RunRecorder, float]:
    """One run, from the first event to the last: what was recorded, and when it ended in seconds."""
    config = EngineConfig(
        max_model_len=LONGEST, scheduling_policy=POLICIES[policy].engine_scheduling or "fcfs"
    )
    gpu = load_gpu("a100-80")
    model = deploy(load_model("llama-2-7b"), gpu, 1, config, engine="vllm-0.11", storage_bytes_per_s=2e9)
    specs = [InstanceSpec(f"i{i:02}", {"m": model}, "m", 1 << 36, ("m",)) for i in range(count)]
    core = make_core(policy, specs, SchedulerSettings())
    recorder = RunRecorder(specs)
    end = simulate(trace, specs, config, core, recorder, solver=InlineSolver(solve))
    assert end.unfinished == 0
    return recorder, end.ended_at


def measure(benchmark: BenchmarkFixture, policy: str, count: int, instances: int, rounds: int) -> None:
    trace = requests(count, instances)
    benchmark.pedantic(loop, args=(policy, trace, instances), rounds=rounds)
    benchmark.extra_info["lengths"] = "azure" if AZURE.exists() else "lognormal"
    benchmark.extra_info["mean_tokens"] = [
        float(trace.prompt_tokens.mean()),
        float(trace.output_tokens.mean()),
    ]
    benchmark.extra_info["requests_per_s"] = round(count / benchmark.stats.stats.median)


@pytest.mark.parametrize("policy", ["vllm", "qlm"])
def test_yardstick(benchmark: BenchmarkFixture, policy: str) -> None:
    benchmark.name = f"yardstick[{policy}]"
    measure(benchmark, policy, 20_000, 4, rounds=3)


@pytest.mark.parametrize("instances", [1, 4, 64])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_policy(benchmark: BenchmarkFixture, policy: str, instances: int) -> None:
    measure(benchmark, policy, 2_000, instances, rounds=1)


@pytest.mark.parametrize("policy", ["vllm", "qlm"])
@pytest.mark.parametrize("grows", ["requests", "instances"])
def test_growth(benchmark: BenchmarkFixture, policy: str, grows: str) -> None:
    """``exponent``: of run time, against requests on 4 instances or instances of 1,000 requests each."""
    sizes = [2_000, 4_000, 8_000, 16_000] if grows == "requests" else [1, 4, 16]
    seconds: list[float] = []

    def grow() -> None:
        for size in sizes:
            count, instances = (size, 4) if grows == "requests" else (1_000 * size, size)
            trace = requests(count, instances)
            began = perf_counter()
            loop(policy, trace, instances)
            seconds.append(perf_counter() - began)

    benchmark.pedantic(grow, rounds=1)
    exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    benchmark.extra_info["exponent"] = round(float(exponent), 3)
    benchmark.extra_info["seconds"] = dict(zip(map(str, sizes), seconds, strict=True))
