"""Means over seeds and their confidence, against independent statistics."""

import numpy as np
import pytest
from scipy import stats

from qlm_sim.metrics.repeats import combine, student_t


def summary(ttft: float | None, swaps: int, saturated: bool = False) -> dict:
    sentence = "full" if saturated else "calm"
    return {"ttft_s": {"mean": ttft}, "swaps": swaps, "saturated": saturated, "saturation": sentence}


@pytest.mark.parametrize("freedom", [1, 4, 20, 21, 50, 500])
def test_student_t_is_scipys(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_mean_and_confidence_are_those_of_a_t_test() -> None:
    values = [1.0, 1.4, 0.9, 1.2]
    found = combine([summary(each, 3) for each in values])
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found["ttft_s"]["mean"] == pytest.approx(np.mean(values))
    assert found["ci95"]["ttft_s"]["mean"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert (found["swaps"], found["ci95"]["swaps"], found["repeats"]) == (3, 0.0, 4)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(1000):
        found = combine([summary(value, 0) for value in rng.normal(2.0, 0.5, 5)])
        held += abs(found["ttft_s"]["mean"] - 2.0) <= found["ci95"]["ttft_s"]["mean"]
    assert 930 <= held <= 970


def test_figures_that_some_runs_lack_are_over_the_others() -> None:
    found = combine([summary(None, 1), summary(2.0, 2), summary(4.0, 3, saturated=True)])
    assert found["ttft_s"]["mean"] == 3.0
    assert found["swaps"] == 2.0
    assert found["saturated"] is True
    assert found["saturation"] == "full"
    assert combine([summary(None, 1), summary(2.0, 1)])["ci95"]["ttft_s"]["mean"] is None
