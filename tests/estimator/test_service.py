"""What lengths mean for an engine: seconds per request, requests per batch, room to keep."""

import pytest

from qlm_sim.estimator.lengths import LengthStatistics
from qlm_sim.estimator.service import RoomRule, ServiceEstimator, group_service
from qlm_sim.estimator.steps import decode_step_s, prefill_s


def test_more_memory_makes_larger_batches_and_cheaper_requests(make_instance):
    lengths = LengthStatistics()
    small = group_service(make_instance(kv_capacity_tokens=5_000, max_num_seqs=256).models["a"], 200, lengths)
    large = group_service(
        make_instance(kv_capacity_tokens=50_000, max_num_seqs=256).models["a"], 200, lengths
    )
    assert large.batch > small.batch
    assert large.decode_s < small.decode_s


def test_a_full_batch_departs_at_the_rate_of_its_decoding(make_instance):
    """Little's law: batch = departures per second x seconds of decoding."""
    profile = make_instance(kv_capacity_tokens=10**6, max_num_seqs=32).models["a"]
    lengths = LengthStatistics()
    service = group_service(profile, 200, lengths)
    kv_tokens = service.batch * (200 + lengths.second_moment / (2 * lengths.mean))
    decoding_s = lengths.mean * decode_step_s(profile, service.batch, kv_tokens)
    assert service.batch / decoding_s == pytest.approx(1 / service.decode_s)


def test_prefill_grows_with_the_prompt_and_covers_every_chunk(make_instance):
    profile = make_instance().models["a"]
    times = [prefill_s(profile, tokens) for tokens in (10, 100, 1000, 5000, 20_000)]
    assert times == sorted(times)
    chunks = 20_000 / profile.max_num_batched_tokens
    assert times[-1] >= chunks * profile.step.base_s(profile.max_num_batched_tokens)


def test_a_slower_engine_takes_longer_and_holds_as_many(make_instance):
    profile = make_instance().models["a"]
    as_promised = group_service(profile, 200, LengthStatistics())
    slower = group_service(profile, 200, LengthStatistics(), slowness=2.0)
    assert slower.prefill_s == pytest.approx(2 * as_promised.prefill_s)
    assert slower.decode_s == pytest.approx(2 * as_promised.decode_s)
    assert slower.batch == as_promised.batch


def test_what_a_request_holds_the_engine_up_is_part_of_what_it_takes(make_instance):
    without, held_up = (
        group_service(make_instance(intake_s=intake_s).models["a"], 200, LengthStatistics(), 1.5)
        for intake_s in (0.0, 0.02)
    )
    assert held_up.prefill_s == pytest.approx(without.prefill_s + 1.5 * 0.02)
    assert held_up.decode_s == without.decode_s


def test_little_memory_keeps_at_most_a_quarter_free():
    rule = ServiceEstimator().room_rule("a", 2_000)
    assert rule.most_tokens == 500
    assert ServiceEstimator().room_rule("a", 10**6).most_tokens > 500


def test_few_running_requests_need_little_room_to_grow():
    rule = RoomRule(most_tokens=2_000, mean_tokens=100, waste_tokens=0)
    assert rule.reserve_tokens(1) == 100
    assert rule.reserve_tokens(1000) == 2_000
    grown = [rule.growth_tokens(10, generated) for generated in (0, 100, 1_000, 10_000)]
    assert grown == sorted(grown)
    assert grown[-1] >= 10_000
