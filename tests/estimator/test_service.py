"""What the estimator believes of service: learnt lengths, and the engine seconds they mean."""

import numpy as np
import pytest

from qlm_sim.estimator.lengths import PRIOR_MEAN_TOKENS, LengthStatistics, OutputLengths
from qlm_sim.estimator.service import decode_step_s, group_service, prefill_s


def test_before_anything_finished_the_prior_holds():
    assert OutputLengths().of_model("a").mean == PRIOR_MEAN_TOKENS


def test_the_prior_fades_behind_what_finished():
    stats = LengthStatistics()
    draws = np.random.default_rng(0).geometric(1 / 80, size=5000)
    for tokens in draws:
        stats.observe(int(tokens))
    assert stats.mean == pytest.approx(draws.mean(), rel=0.02)
    assert stats.variance == pytest.approx(draws.var(), rel=0.05)


def test_classes_of_a_model_are_kept_apart():
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.observe("a", "chat", 50)
        lengths.observe("a", "batch", 800)
    assert lengths.of_class("a", "chat").mean < 60 < lengths.of_model("a").mean
    assert lengths.of_class("a", "batch").mean > 700


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
