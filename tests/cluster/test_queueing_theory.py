"""Limits in which an engine is a queue of the textbooks. Kleinrock, Queueing Systems, vol. 1 and 2.

A request of n output tokens on an engine that runs one at a time, one token a second, is n seconds of
service. Means are compared within four standard errors, found by batch means.
"""

from math import factorial

import numpy as np
from cluster.lab import Log, SharedQueue, Step, instance, run
from numpy.typing import NDArray

from qlm_sim.core.types import InstanceSpec

REQUESTS = 20_000
MEAN_S = 100.0


def rows(
    load: float, servers: int, output_tokens: NDArray[np.int64], seed: int
) -> list[tuple[float, int, int]]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(MEAN_S / (load * servers), REQUESTS))
    return [
        (arrival, 1, output)
        for arrival, output in zip(arrivals.tolist(), output_tokens.tolist(), strict=True)
    ]


def exponential(seed: int) -> NDArray[np.int64]:
    """Geometric lengths: exponential but for the rounding to whole tokens, 0.5 % of the second moment."""
    return np.random.default_rng(seed).geometric(1 / MEAN_S, REQUESTS)


def mean_of(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error by 30 batch means, without the first tenth."""
    batches = values[len(values) // 10 :].reshape(30, -1).mean(axis=1)
    return float(batches.mean()), float(batches.std(ddof=1) / np.sqrt(30))


def waits(log: Log, trace: list[tuple[float, int, int]]) -> NDArray[np.float64]:
    """Seconds from arrival to the start of service: the first token comes one second later."""
    first = log.first_tokens()
    return np.array([first[f"r{i:05}"] - 1.0 - arrival for i, (arrival, _, _) in enumerate(trace)])


def assert_mean(values: NDArray[np.float64], theory: float) -> None:
    mean, error = mean_of(values)
    assert error < 0.1 * theory, "too noisy to tell anything"
    assert abs(mean - theory) < 4 * error, f"{mean:.1f} ± {error:.1f}, theory {theory:.1f}"


def one_at_a_time(name: str = "i0") -> InstanceSpec:
    return instance(name, max_num_seqs=1)


def test_m_m_1() -> None:
    load = 0.7
    trace = rows(load, 1, exponential(1), seed=2)
    log, _ = run(trace, one_at_a_time(), report_interval_s=1e6)
    assert_mean(waits(log, trace), load / (1 - load) * MEAN_S)


def test_m_d_1() -> None:
    load = 0.8
    trace = rows(load, 1, np.full(REQUESTS, int(MEAN_S)), seed=3)
    log, _ = run(trace, one_at_a_time(), report_interval_s=1e6)
    assert_mean(waits(log, trace), load / (2 * (1 - load)) * MEAN_S)


def test_m_m_c() -> None:
    load, servers = 0.8, 4
    trace = rows(load, servers, exponential(4), seed=5)
    instances = [one_at_a_time(f"i{i}") for i in range(servers)]
    log, _ = run(trace, instances, core=SharedQueue(instances), report_interval_s=1e6)
    offered = load * servers
    queued = offered**servers / factorial(servers) / (1 - load)
    erlang_c = queued / (sum(offered**k / factorial(k) for k in range(servers)) + queued)
    assert_mean(waits(log, trace), erlang_c * MEAN_S / (servers * (1 - load)))


def test_m_g_1_processor_sharing() -> None:
    """An iteration whose time is that of its sequences shares the engine evenly among them. The mean
    time in the system then depends on the service times by their mean alone: E[S] / (1 - load). What an
    arrival waits for the end of the iteration under way, about one second, is left out."""
    load = 0.6
    step = Step(base=0.0, token=0.0, seq_s=1.0, kv_token_s=0.0, prefill_pair_s=0.0)
    short_or_long = np.random.default_rng(6).choice([50, 300], p=[0.8, 0.2], size=REQUESTS)
    trace = rows(load, 1, short_or_long, seed=7)
    log, _ = run(trace, instance(step=step), report_interval_s=1e6)
    finishes = log.finishes()
    spent = np.array([finishes[f"r{i:05}"] - arrival for i, (arrival, _, _) in enumerate(trace)])
    assert_mean(spent, MEAN_S / (1 - load))
