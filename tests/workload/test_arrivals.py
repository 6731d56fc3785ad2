"""Arrival processes against their theory."""

import math

import numpy as np
import pytest
from scipy import stats

from qlm_sim.errors import InputError
from qlm_sim.workload.arrivals import arrival_times, parse_arrivals, rescale

N = 100_000


def gaps(kind: str, rate_rps: float = 4.0) -> np.ndarray:
    return np.diff(arrival_times(kind, rate_rps, N, np.random.default_rng(7)), prepend=0.0)


@pytest.mark.parametrize(
    ("kind", "cv"), [("poisson", 1.0), ("gamma:0.5", 0.5), ("gamma:2.6", 2.6), ("gamma:1", 1.0)]
)
def test_gaps_have_the_mean_and_the_variation_of_their_process(kind, cv):
    found = gaps(kind)
    assert abs(found.mean() - 0.25) < 4 * 0.25 * cv / math.sqrt(N)
    # Delta method for the CV of a gamma sample: its moments are 2 cv (skewness), 3 + 6 cv^2 (kurtosis).
    skewness, kurtosis = 2 * cv, 3 + 6 * cv**2
    variance = cv**2 * ((kurtosis - 1) / 4 - cv * skewness + cv**2)
    assert abs(found.std() / found.mean() - cv) < 4 * math.sqrt(variance / N)


@pytest.mark.parametrize(("kind", "cv"), [("poisson", 1.0), ("gamma:1.5", 1.5)])
def test_gaps_have_the_distribution_of_their_process(kind, cv):
    theory = stats.gamma(a=cv**-2, scale=0.25 * cv**2)
    assert stats.kstest(gaps(kind), theory.cdf).pvalue > 1e-4


def test_poisson_counts_are_as_variable_as_their_mean():
    times = arrival_times("poisson", 4.0, N, np.random.default_rng(3))
    windows = int(times[-1] // 10)
    counts = np.histogram(times, bins=windows, range=(0, windows * 10))[0]
    assert abs(counts.var() / counts.mean() - 1) < 4 * math.sqrt(2 / windows)


def test_uniform_gaps_are_equal():
    assert gaps("uniform") == pytest.approx(np.full(N, 0.25))


@pytest.mark.parametrize("kind", ["poisson", "gamma:3", "uniform"])
def test_another_rate_only_stretches_time(kind):
    slow, fast = (arrival_times(kind, rate, 50, np.random.default_rng(1)) for rate in (1.0, 8.0))
    assert slow == pytest.approx(fast * 8)
    assert (np.diff(slow) >= 0).all()
    assert slow[0] >= 0


def test_rescaled_times_have_the_rate_and_the_pattern():
    times = np.array([1.0, 2.0, 2.0, 6.0])
    scaled = rescale(times, 3.0)
    assert np.diff(scaled).mean() == pytest.approx(1 / 3)
    assert scaled / scaled[0] == pytest.approx(times)
    with pytest.raises(InputError, match="all arrive at one time"):
        rescale(np.zeros(3), 1.0)


@pytest.mark.parametrize(
    "kind",
    ["", "poison", "gamma", "gamma:", "gamma:x", "gamma:-1", "gamma:0", "gamma:nan", "poisson:2", "Poisson"],
)
def test_unknown_kind_says_what_would_be_right(kind):
    with pytest.raises(InputError, match=r"gamma:2\.5"):
        parse_arrivals(kind)


@pytest.mark.parametrize("rate_rps", [0.0, -1.0, math.nan, math.inf])
def test_impossible_rate_is_refused(rate_rps):
    with pytest.raises(InputError, match="above 0"):
        arrival_times("poisson", rate_rps, 3, np.random.default_rng(0))
