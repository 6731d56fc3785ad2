"""How fast the simulated engines are: ``pytest tests/bench/bench_engine.py``.

The whole loop, Runtime and events included, but for the scheduler core, which here only sends each
request to the least loaded instance: what is left for a core to add is the rest of the yardstick.
Llama-2-7B on A100-80, Poisson arrivals, lengths of mean 882 in and 282 out, at most 4,096 together.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from cluster.lab import Push, workload
from pytest_benchmark.fixture import BenchmarkFixture

from qlm_sim.cluster.simulation import SimulationEnd, simulate
from qlm_sim.core.actions import Action
from qlm_sim.core.events import Event
from qlm_sim.core.types import InstanceSpec
from qlm_sim.models.deployment import deploy
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.hardware import load_gpu
from qlm_sim.models.specs import load_model
from qlm_sim.workload.workload import Workload

LONGEST = 4096
CONFIG = EngineConfig(max_model_len=LONGEST)


class Nowhere:
    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        pass


def requests(count: int, rate: float, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    prompt = np.clip(rng.lognormal(np.log(959) - 0.5, 1.0, count), 8, 3500).astype(int)
    output = np.clip(rng.lognormal(np.log(283) - 0.32, 0.8, count), 2, LONGEST - prompt).astype(int)
    arrival = np.cumsum(rng.exponential(1 / rate, count))
    return workload(list(zip(arrival.tolist(), prompt.tolist(), output.tolist(), strict=True)))


def instances(count: int) -> list[InstanceSpec]:
    model = deploy(
        load_model("llama-2-7b"), load_gpu("a100-80"), 1, CONFIG, engine="vllm-0.11", storage_bytes_per_s=2e9
    )
    return [InstanceSpec(f"i{i:02}", {"m": model}, "m", 1 << 36, ("m",)) for i in range(count)]


@pytest.mark.parametrize("engine", ["leap", "stepping"])
@pytest.mark.parametrize("rate", [3.0, 6.0], ids=["3-per-s", "6-per-s"])
@pytest.mark.parametrize("replicas", [1, 4, 64])
def test_engine_only(benchmark: BenchmarkFixture, replicas: int, rate: float, engine: str) -> None:
    """``rate``: requests per second and replica; at 6 the KV cache is full most of the time."""
    count = 20_000 if engine == "leap" else 4_000
    trace, specs = requests(count, rate * replicas), instances(replicas)

    def loop() -> SimulationEnd:
        return simulate(trace, specs, CONFIG, Push(specs), Nowhere(), engine=engine)  # type: ignore[arg-type]

    end = benchmark.pedantic(loop, rounds=5, warmup_rounds=1)
    assert end.unfinished == 0
    benchmark.extra_info["mean_tokens"] = (
        float(trace.prompt_tokens.mean()),
        float(trace.output_tokens.mean()),
    )
    benchmark.extra_info["us_per_request"] = round(benchmark.stats.stats.min / count * 1e6, 2)
    benchmark.extra_info["requests_per_s"] = round(count / benchmark.stats.stats.min)
