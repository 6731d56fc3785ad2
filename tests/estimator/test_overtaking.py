"""Waits while more urgent requests pass, against Cobham's formula and a queue that is played through."""

from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from statistics import NormalDist

import numpy as np
import pytest

from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.policy import Overtaking
from qlm_sim.estimator.arrivals import GOES_ON, MEMORY_S, PRIOR_S, Arrivals
from qlm_sim.estimator.overtaking import LEAST_LEFT, Overtaken, Passing, passes_for_s, stretched_s


@dataclass
class Known:
    """A wait that is known to the second."""

    mean_s: float

    def quantile(self, p):
        return self.mean_s

    def within(self, seconds):
        return float(self.mean_s <= seconds)


def passing(load, for_s=inf, variance_s=0.0, load_error=0.0):
    return Passing(load, variance_s, load_error, for_s)


def test_nobody_passes_nothing_changes():
    assert stretched_s(10.0, []) == (10.0, 1.0)


def test_those_who_always_pass_stretch_the_wait():
    assert stretched_s(10.0, [passing(0.3), passing(0.2)]) == pytest.approx((20.0, 2.0))


def test_those_who_are_soon_due_later_add_what_comes_until_then():
    assert stretched_s(100.0, [passing(0.5, for_s=20.0)]) == pytest.approx((110.0, 1.0))
    assert stretched_s(100.0, [passing(0.5, for_s=20.0), passing(0.5)]) == pytest.approx((220.0, 2.0))


def test_the_wait_solves_its_equation_under_any_load():
    rng = np.random.default_rng(0)
    for _ in range(200):
        coming = sorted(
            (passing(*rng.uniform((0, 0), (1.0, 300.0))) for _ in range(3)), key=lambda p: p.for_s
        )
        own_s = float(rng.uniform(0.1, 100.0))
        total_s, _ = stretched_s(own_s, coming)
        assert total_s == pytest.approx(own_s + sum(p.load * min(total_s, p.for_s) for p in coming))


def test_in_overload_something_is_left():
    assert stretched_s(10.0, [passing(1.5)])[0] == pytest.approx(10.0 / LEAST_LEFT)


def test_a_longer_wait_stays_longer_and_quantiles_ascend():
    coming = [passing(0.6, for_s=50.0, variance_s=0.5, load_error=0.05), passing(0.3, variance_s=0.5)]
    means = [Overtaken(Known(each), coming).mean_s for each in (1.0, 10.0, 30.0, 100.0)]
    assert means == sorted(means)
    told = Overtaken(Known(30.0), coming)
    quantiles = [told.quantile(p) for p in (0.01, 0.1, 0.5, 0.9, 0.99)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] >= 30.0
    for p in (0.2, 0.5, 0.9):
        assert told.within(told.quantile(p)) == pytest.approx(p, abs=0.02)


def test_variance_is_that_of_a_delay_busy_period():
    """λ·E[S²]·W0 / (1 - ρ)³ where the first delay is known."""
    load, variance_s = 0.6, 1.2
    told = Overtaken(Known(400.0), [passing(load, variance_s=variance_s)])
    sd_s = (told.quantile(0.9) - told.quantile(0.5)) / NormalDist().inv_cdf(0.9)
    assert sd_s**2 == pytest.approx(variance_s * 400.0 / (1 - load) ** 3)


def played(loads, count, seed):
    """(work found ahead, wait) of every request of the second class of M/G/1, non-preemptive priorities.

    Service is exponential with mean 1 s; ``loads`` by class.
    """
    rng = np.random.default_rng(seed)
    share = loads[0] / sum(loads)
    arrivals = np.cumsum(rng.exponential(1 / sum(loads), count))
    urgent = rng.random(count) < share
    service = rng.exponential(1.0, count)
    queue: list[tuple[bool, int]] = []
    waiting_s = free_at = 0.0
    told = {}
    result = []

    def serve(until):
        nonlocal free_at, waiting_s
        while queue and free_at <= until:
            loose, number = heappop(queue)
            waiting_s -= service[number]
            if loose:
                result.append((told[number], free_at - arrivals[number]))
            free_at += service[number]

    for number, at in enumerate(arrivals):
        serve(at)
        free_at = max(free_at, at)
        told[number] = free_at - at + waiting_s
        heappush(queue, (not urgent[number], number))
        waiting_s += service[number]
    serve(inf)
    return np.array(result)


def test_priorities_wait_as_cobham_says_and_as_told():
    first, second = loads = (0.5, 0.3)
    found, waited = played(loads, 200_000, seed=1).T
    coming = [passing(first, variance_s=2 * first)]
    told = [Overtaken(Known(each), coming) for each in found]
    residual = sum(loads)  # λ·E[S²] / 2 of exponential services
    cobham = residual / ((1 - first) * (1 - first - second))
    batches = waited[: len(waited) // 50 * 50].reshape(50, -1).mean(axis=1)
    error = batches.std(ddof=1) / 50**0.5
    means = np.array([each.mean_s for each in told])
    assert abs(waited.mean() - cobham) < 4 * error
    assert abs(means.mean() - cobham) < 4 * error / (1 - first)
    # Who found little ahead waits as a skew distribution has it, which is cut off at 0.
    long = found > 8.0
    within = np.mean([w <= t.quantile(0.9) for w, t in zip(waited[long], np.array(told)[long], strict=True)])
    assert within == pytest.approx(0.9, abs=0.02)
    assert abs(means[long].mean() / waited[long].mean() - 1) < 0.03


def test_rules(make_request):
    loose = Tracked(make_request("r0", slo_s=3600.0, at=100.0))
    assert passes_for_s(Overtaking.NONE, loose, 20.0, 150.0) == 0.0
    assert passes_for_s(Overtaking.BY_SLO, loose, 20.0, 150.0) == inf
    assert passes_for_s(Overtaking.BY_SLO, loose, 3600.0, 150.0) == 0.0
    assert passes_for_s(Overtaking.BY_DEADLINE, loose, 20.0, 150.0) == 3530.0
    assert passes_for_s(Overtaking.BY_DEADLINE, loose, 3600.0, 150.0) == 0.0


def test_arrivals_are_told_by_their_rate(make_request):
    arrivals = Arrivals()
    for number in range(2000):
        arrivals.came(Tracked(make_request(f"r{number}", prompt=100 + number % 2 * 200)), number / 2)
    (coming,) = arrivals.coming(1000.0)
    assert coming.per_s == pytest.approx(2.0, rel=2 * PRIOR_S / MEMORY_S)
    assert coming.prompt_tokens == pytest.approx(200.0, rel=0.01)
    assert coming.for_s == GOES_ON * (1000.0 + PRIOR_S)
    (later,) = arrivals.coming(1000.0 + 3 * MEMORY_S)
    assert later.per_s < 0.1
    assert later.seen < 0.1 * coming.seen


def test_clients_that_name_slos_of_their_own_are_told_of_in_few_kinds(make_request):
    """40,000 of them, from 10 ms to 100 s, and one who has none."""
    arrivals = Arrivals()
    slos_s = [inf, *(0.01 * 10 ** (number / 10_000) for number in range(40_000))]
    for number, slo_s in enumerate(slos_s):
        arrivals.came(Tracked(make_request(f"r{number}", slo_s=slo_s)), 0.0)
    told = list(arrivals.coming(1.0))
    assert len(told) < 100
    assert sum(each.seen for each in told) == pytest.approx(len(slos_s), rel=0.01)
    assert all(any(0.85 < slo_s / each.slo_s < 1.2 for each in told) for slo_s in slos_s[1:])


def test_the_oldest_who_waits_is_known(make_request):
    arrivals = Arrivals()
    items = [Tracked(make_request(f"r{number}", at=float(number))) for number in range(3)]
    for item in items:
        arrivals.came(item, item.request.arrived_at)
    assert arrivals.waited_since("a") == 0.0
    items[0].cancelled = True
    assert arrivals.waited_since("a") == 1.0
    assert arrivals.waited_since("b") == inf
