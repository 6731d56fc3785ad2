"""How many requests per second a whole simulated cluster serves: core, policy, recorder, solver, engines.

The yardstick is Llama-2-7B on four A100-80 at 24 requests/s; extra_info says whose lengths.
``pytest tests/bench/bench_yardstick.py --benchmark-only -k yardstick`` takes those of Azure's first 2,000
conversations and those of all.
"""

from time import process_time

import numpy as np
import pytest
from bench.yardstick import AZURE, loop, requests
from pytest_benchmark.fixture import BenchmarkFixture

from qlm_sim.policies import POLICIES


def measure(
    benchmark: BenchmarkFixture,
    policy: str,
    count: int,
    instances: int,
    rounds: int,
    *,
    all_of_azure: bool = False,
) -> None:
    trace = requests(count, instances, all_of_azure=all_of_azure)
    benchmark.pedantic(loop, args=(policy, trace, instances), rounds=rounds)
    azure = "all of azure" if all_of_azure else "azure's first"
    benchmark.extra_info["lengths"] = azure if AZURE.exists() else "lognormal"
    benchmark.extra_info["mean_tokens"] = [
        float(trace.prompt_tokens.mean()),
        float(trace.output_tokens.mean()),
    ]
    benchmark.extra_info["requests_per_s"] = round(count / benchmark.stats.stats.median)


@pytest.mark.parametrize("policy", ["vllm", "qlm"])
def test_yardstick(benchmark: BenchmarkFixture, policy: str) -> None:
    benchmark.name = f"yardstick[{policy}]"
    measure(benchmark, policy, 20_000, 4, rounds=5)


@pytest.mark.skipif(not AZURE.exists(), reason="needs the Azure conversation trace")
@pytest.mark.parametrize("policy", ["vllm", "qlm"])
def test_yardstick_all(benchmark: BenchmarkFixture, policy: str) -> None:
    benchmark.name = f"yardstick_all[{policy}]"
    measure(benchmark, policy, 20_000, 4, rounds=5, all_of_azure=True)


@pytest.mark.parametrize("instances", [1, 4, 64])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_policy(benchmark: BenchmarkFixture, policy: str, instances: int) -> None:
    measure(benchmark, policy, 2_000, instances, rounds=1)


@pytest.mark.parametrize("policy", ["vllm", "qlm"])
@pytest.mark.parametrize("grows", ["requests", "instances"])
def test_growth(benchmark: BenchmarkFixture, policy: str, grows: str) -> None:
    """``exponent``: of CPU time, against requests on 4 instances or instances of 1,000 requests each."""
    sizes = [2_000, 4_000, 8_000, 16_000] if grows == "requests" else [1, 4, 16]
    seconds: list[float] = []

    def grow() -> None:
        for size in sizes:
            count, instances = (size, 4) if grows == "requests" else (1_000 * size, size)
            trace = requests(count, instances)
            began = process_time()
            loop(policy, trace, instances)
            seconds.append(process_time() - began)

    benchmark.pedantic(grow, rounds=1)
    exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    benchmark.extra_info["exponent"] = round(float(exponent), 3)
    benchmark.extra_info["seconds"] = dict(zip(map(str, sizes), seconds, strict=True))
