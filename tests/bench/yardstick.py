"""The yardstick's requests and its run, which the benches share.

Llama-2-7B on A100-80 at 6 requests/s an instance. Lengths are drawn from the Azure conversation trace (input
and output together at most 4,096 tokens) where QLM_DATA or ../shared has it: from its first 2,000 requests,
of means 882 and 282, which overload the instances a little; or from all, of means 886 and 225. Without the
trace, lengths are lognormal, of nearly the means of the first 2,000.
"""

import csv
import os
from pathlib import Path

import numpy as np

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
FIRST = 2_000
SHARED = Path(os.environ.get("QLM_DATA", Path(__file__).parents[3] / "shared"))
AZURE = SHARED / "data/azure_llm_2023/AzureLLMInferenceTrace_conv.csv"


def requests(count: int, instances: int, *, all_of_azure: bool = False) -> Workload:
    rng = np.random.default_rng(0)
    if AZURE.exists():
        with AZURE.open() as file:
            rows = [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in csv.DictReader(file)]
        lengths = np.array([row for row in rows if sum(row) <= LONGEST and min(row) > 0])
        if not all_of_azure:
            lengths = lengths[:FIRST]
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
    core = make_core(
        policy,
        specs,
        SchedulerSettings(output_tokens=trace.output_by_id() if POLICIES[policy].told else None),
    )
    recorder = RunRecorder(specs)
    end = simulate(trace, specs, config, core, recorder, solver=InlineSolver(solve))
    assert end.unfinished == 0
    return recorder, end.ended_at
