"""Forecasts are corrected by how earlier ones turned out: their means, their quantiles, by depth."""

from statistics import NormalDist

import numpy as np
import pytest

from qlm_sim.core.lifecycle import Tracked
from qlm_sim.estimator.record import MOST_OPEN, TrackRecord


class Bell:
    """A normal wait with standard deviation 1 s."""

    def __init__(self, mean_s):
        self.mean_s = mean_s

    def quantile(self, p):
        return NormalDist(self.mean_s, 1.0).inv_cdf(p)


@pytest.fixture
def told_and_waited(make_request):
    """Tells ``count`` requests one after the other; each waits ``factor`` times as told, give or take
    ``spread_s``. Returns the record and the clock."""

    def run(count, *, factor=1.0, spread_s=1.0, ahead=3, together=1, record=None, seed=0):
        record = record or TrackRecord()
        rng = np.random.default_rng(seed)
        now = 1000.0 * seed
        within = []
        for number in range(0, count, together):
            names = [f"{seed}-{number + i}" for i in range(together)]
            for name in names:
                wait = record.corrected(Tracked(make_request(name)), ahead, Bell(10.0), now, keep=True)
            waited_s = 10.0 * factor + spread_s * rng.standard_normal()
            now += waited_s
            for name in names:
                record.first_token(name, now)
            within.append(waited_s <= wait.quantile(0.9))
        return record, wait, np.array(within)

    return run


def test_before_anything_was_scored_the_forecast_stands(make_request):
    wait = TrackRecord().corrected(Tracked(make_request("r")), 3, Bell(10.0), 0.0, keep=True)
    assert wait.mean_s == 10.0
    for p in (0.1, 0.3, 0.5, 0.8, 0.9):
        assert wait.quantile(p) == Bell(10.0).quantile(p)


def test_quantiles_invert_the_probability(told_and_waited):
    _, wait, _ = told_and_waited(50, factor=1.2)
    for p in (0.1, 0.3, 0.5, 0.8, 0.9):
        assert wait.within(wait.quantile(p)) == pytest.approx(p, abs=0.02)
    assert wait.within(1e3) == 1.0


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.6])
def test_the_mean_follows_what_was_waited(told_and_waited, factor):
    _, wait, _ = told_and_waited(400, factor=factor)
    assert wait.mean_s == pytest.approx(10.0 * factor, rel=0.06)


@pytest.mark.parametrize("spread_s", [0.3, 1.0, 3.0])
def test_nine_of_ten_come_within_the_bound_whatever_the_spread(told_and_waited, spread_s):
    """2,000 waits: the standard error of the share is 0.7 points."""
    _, wait, within = told_and_waited(2000, factor=1.1, spread_s=spread_s)
    assert within[200:].mean() == pytest.approx(0.9, abs=0.025)
    assert wait.quantile(0.9) == pytest.approx(11.0 + 1.2816 * spread_s, abs=0.3 + 0.15 * spread_s)


def test_what_was_told_in_one_moment_counts_once(told_and_waited):
    _, one_by_one, _ = told_and_waited(100, factor=2.0)
    _, together, _ = told_and_waited(100, factor=2.0, together=100, ahead=3)
    record, after, _ = told_and_waited(100, factor=2.0, together=100)
    _, after, _ = told_and_waited(1, factor=2.0, record=record, seed=1)
    assert one_by_one.mean_s > 18
    assert together.mean_s == 10.0
    assert after.mean_s < 11.5


def test_another_depth_learns_less_and_another_class_nothing(told_and_waited, make_request):
    record, _, _ = told_and_waited(400, factor=2.0, ahead=3)
    means = {}
    for ahead, slo_class in ((3, "interactive"), (20, "interactive"), (2000, "interactive"), (3, "batch")):
        item = Tracked(make_request("new", slo_class=slo_class))
        wait = record.corrected(item, ahead, Bell(10.0), 1e5, keep=False)
        means[ahead, slo_class] = wait.mean_s
    assert means[3, "interactive"] > means[20, "interactive"] > 11
    assert means[2000, "interactive"] == means[3, "batch"] == 10.0


def test_forecasts_of_requests_that_never_start_are_given_up(make_request):
    record = TrackRecord()
    for number in range(3 * MOST_OPEN):
        record.corrected(Tracked(make_request(str(number))), 3, Bell(10.0), float(number), keep=True)
    assert 0 < len(record.awaited) <= MOST_OPEN
