"""What the estimator does with true lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_sim.core.actions import Pull
from qlm_sim.core.events import FirstToken, RequestArrived
from qlm_sim.core.groups import GroupKey, GroupTable
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.estimator.told import ToldEstimator, peak_tokens
from qlm_sim.policies import SchedulerSettings, make_core


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), min_size=1, max_size=12))
def test_peak_is_that_of_following_every_token(sequences):
    held, left = (np.array(column, dtype=float) for column in zip(*sequences, strict=True))
    followed = max(
        sum(tokens + step for tokens, steps in sequences if steps >= step) for step in range(1, 61)
    )
    assert peak_tokens(held, left) == followed


def test_lengths_of_a_group_are_those_of_its_own_requests(make_request):
    told = ToldEstimator({"r0": 10, "r1": 50, "r2": 900})
    table = GroupTable()
    items = [Tracked(make_request(name)) for name in ("r0", "r1")]
    items[1].output_tokens = 20
    for item in items:
        group, _ = table.join(item, GroupKey("a", "interactive", 0), 10)
    assert told.of_waiting(group).mean == pytest.approx((10 + 30) / 2)
    assert told.band(make_request("r0")) == told.band(make_request("r1")) != told.band(make_request("r2"))


def test_room_is_kept_for_what_will_be_generated_and_for_no_more(make_instance, make_request):
    spec = make_instance(kv_capacity_tokens=1_000, max_num_seqs=8)
    lengths = {"r0": 300, "r1": 300, "r2": 300}
    core = make_core("clairvoyant", [spec], SchedulerSettings(output_tokens=lengths))
    # Each ends at 400 tokens: two fit beside each other at their fullest, three do not.
    pulled = core.handle(0.0, [RequestArrived(make_request(name)) for name in lengths])
    assert [order.request_id for order in pulled if isinstance(order, Pull)] == ["r0", "r1"]
    later = core.handle(0.1, [FirstToken("r0", 1, "i0"), FirstToken("r1", 1, "i0")])
    assert not any(isinstance(order, Pull) for order in later)
