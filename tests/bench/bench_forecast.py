"""What a forecast costs: a new one of a line, by its length, and one more question while it is fresh."""

import pytest

from qlm_sim.core.events import FirstToken, RequestArrived
from qlm_sim.policies import SchedulerSettings, make_core

SLOTS = 256


@pytest.fixture(params=[1_000, 10_000, 100_000])
def core(request, make_instance, make_request):
    """A full engine under qlm and so many requests that wait for it."""
    instance = make_instance(max_num_seqs=SLOTS, kv_capacity_tokens=10**6)
    core = make_core("qlm", [instance], SchedulerSettings(forecasts=True))
    # All of one instant, so that the policy plans once.
    core.handle(
        0.0,
        [
            RequestArrived(make_request(f"r{i:06}", slo_s=3600.0, prompt=50 + i % 400))
            for i in range(SLOTS + request.param)
        ],
    )
    ledger = core.ledgers["i0"]
    while ledger.prefilling_tokens:
        # A prompt after the other is let in, until the slots are full.
        prefilled = [item for item in ledger.running.values() if item.first_token_at is None]
        core.handle(0.1, [FirstToken(item.request.id, 1, "i0") for item in prefilled])
    return core


def last(core):
    """The one who has all others before it."""
    return core.policy.order(core.ledgers["i0"], 0.1)[-1].items[-1].request.id


@pytest.mark.benchmark(group="forecast")
def test_a_new_forecast_of_the_line(benchmark, core):
    name = last(core)

    def new():
        core.forecaster._lines.clear()
        return core.forecast(name, 0.1)

    assert benchmark(new).mean_s > 10


@pytest.mark.benchmark(group="forecast")
def test_a_question_while_the_forecast_is_fresh(benchmark, core):
    name = last(core)
    assert benchmark(lambda: core.forecast(name, 0.1).quantile(0.9)) > 10
