"""What an engine was seen to get done counts while something waits, once the batch is steady."""

import pytest

from qlm_sim.estimator.pace import Pace


def seen(pace, times, *, waited=True, running=2, ended=1):
    """``times`` stretches of 100 steps of 10 ms: two sequences of 500 tokens, one prefill, one end each."""
    for _ in range(times):
        pace.decoded(100, 1.0, 2, 1000)
        pace.prefilled(0.2, 0.25)
        for _ in range(ended):
            pace.ended()
        pace.check(waited, running)


def test_throughput_is_that_of_the_time_in_which_something_waited():
    pace = Pace()
    seen(pace, 12)
    seen(pace, 5, waited=False)
    assert pace.decode_s / pace.sequence_steps == pytest.approx(1.0 / 200)
    assert pace.decode_s / pace.kv_steps == pytest.approx(1.0 / 100_000)
    assert pace.prefill_s / pace.alone_s == pytest.approx(0.8)


def test_a_young_batch_says_nothing():
    pace = Pace()
    seen(pace, 10, running=50)
    assert pace.steps == 0
    seen(pace, 50, running=50)
    assert pace.steps == pytest.approx(11 * 100, rel=0.05)


def test_a_pause_makes_the_batch_young_again():
    pace = Pace()
    seen(pace, 3)
    steps = pace.steps
    seen(pace, 1, waited=False)
    seen(pace, 1)
    assert pace.steps == steps


def test_the_recent_weighs_most():
    pace = Pace()
    seen(pace, 1000)
    for _ in range(1000):
        pace.decoded(100, 2.0, 2, 1000)
        pace.ended()
        pace.check(True, 2)
    assert pace.decode_s / pace.steps == pytest.approx(0.02, rel=0.01)
