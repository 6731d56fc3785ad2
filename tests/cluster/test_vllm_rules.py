"""vLLM V1's scheduling rules, one small case each, computed by hand.

Every iteration takes one second, so a time is the number of iterations since the arrival.
"""

import pytest
from cluster.lab import SECOND, Step, instance, model, run, workload

from qlm_sim.core.events import FirstToken, RequestFailed, RequestFinished
from qlm_sim.errors import InputError
from qlm_sim.models.engine_config import EngineConfig


def test_first_token_comes_with_the_prefill_and_one_more_with_each_iteration() -> None:
    log, end = run([(0.0, 100, 5)], instance())
    assert log.first_tokens() == {"r0": 1.0}
    assert log.finishes() == {"r0": 5.0}
    assert end.ended_at == 5.0


def test_one_token_of_output_is_first_and_last_in_the_same_instant() -> None:
    log, _ = run([(0.0, 100, 1)], instance())
    assert log.first_tokens() == log.finishes() == {"r0": 1.0}


def test_long_prompt_is_computed_in_chunks_of_the_token_budget() -> None:
    log, _ = run([(0.0, 250, 2)], instance(max_num_batched_tokens=100, max_num_seqs=10))
    assert log.first_tokens() == {"r0": 3.0}
    assert log.finishes() == {"r0": 4.0}


def test_decodes_take_their_token_of_the_budget_before_a_chunk_does() -> None:
    """r0 decodes from 1 s on, so r1's chunks are 9, 9, 2 tokens; a budget of 10 alone would do in two."""
    log, _ = run([(0.0, 5, 50), (0.5, 20, 2)], instance(max_num_batched_tokens=10, max_num_seqs=10))
    assert log.first_tokens() == {"r0": 1.0, "r1": 4.0}
    assert log.finishes()["r0"] == 50.0


def test_what_a_finished_prompt_leaves_of_the_budget_goes_to_the_next_prompt() -> None:
    """Iterations: r0 6 and r1 4 of 6; then r0's token, r1's other 2 and 7 of r2's 8; then its last."""
    log, _ = run(
        [(0.0, 6, 9), (0.0, 6, 9), (0.0, 8, 9)], instance(max_num_batched_tokens=10, max_num_seqs=10)
    )
    assert log.first_tokens() == {"r0": 1.0, "r1": 2.0, "r2": 3.0}


def test_no_more_than_max_num_seqs_run_and_the_next_follows_a_finish_at_once() -> None:
    log, _ = run([(0.0, 10, 3), (0.0, 10, 5), (0.0, 10, 2)], instance(max_num_seqs=2))
    assert log.first_tokens() == {"r0": 1.0, "r1": 1.0, "r2": 4.0}
    assert log.finishes() == {"r0": 3.0, "r1": 5.0, "r2": 5.0}


def test_arrival_in_mid_iteration_waits_for_its_end() -> None:
    log, _ = run([(0.0, 10, 100), (10.25, 10, 2)], instance())
    assert log.first_tokens()["r1"] == 12.0
    assert log.finishes() == {"r0": 100.0, "r1": 13.0}


def test_arrival_at_the_end_of_an_iteration_joins_the_next() -> None:
    log, _ = run([(0.0, 10, 100), (10.0, 10, 2)], instance())
    assert log.first_tokens()["r1"] == 11.0


def test_first_come_first_served_even_where_a_later_one_would_fit() -> None:
    """r0 holds 4 of 8 blocks, r1 needs 5; r2 needs one and waits behind r1."""
    log, _ = run(
        [(0.0, 50, 5), (0.0, 70, 2), (0.0, 10, 2)],
        instance(kv_capacity_tokens=8 * 16),
    )
    assert log.first_tokens() == {"r0": 1.0, "r1": 6.0, "r2": 6.0}


def test_blocks_are_counted_for_the_chunk_and_if_asked_for_the_whole_prompt() -> None:
    """Nine blocks, 80 tokens a step. r0 (3 blocks, then 4) runs until 6 s. r1 needs 6 blocks in all: its
    first chunk fits beside r0, its second does not, so it is admitted and preempted over and over."""
    rows = [(0.0, 48, 6), (0.0, 96, 2)]
    small = instance(kv_capacity_tokens=9 * 16, max_num_batched_tokens=80, max_num_seqs=10)
    log, _ = run(rows, small)
    assert log.first_tokens() == {"r0": 1.0, "r1": 8.0}
    assert log.reports()[-1][1].preemptions == 3
    log, _ = run(rows, small, EngineConfig(scheduler_reserve_full_isl=True))
    assert log.first_tokens() == {"r0": 1.0, "r1": 8.0}
    assert log.reports()[-1][1].preemptions == 1, "admitted once, when r0 had 3 blocks"


SIX_BLOCKS_OF_FOUR = instance(kv_capacity_tokens=24)


def test_latest_admitted_is_preempted_and_keeps_its_generated_tokens() -> None:
    """Both prompts fill 2 blocks; the second token needs a third, the sixth a fourth: then, at 5 s, r1
    has to go. It has 5 tokens and comes back when r0 is done at 9 s; its recompute gives the sixth."""
    log, _ = run([(0.0, 8, 9), (0.0, 8, 9)], SIX_BLOCKS_OF_FOUR, EngineConfig(block_size=4))
    assert log.finishes() == {"r0": 9.0, "r1": 13.0}
    assert log.times(FirstToken) == {"r0": [1.0], "r1": [1.0]}, "an engine's own preemption is no new attempt"
    assert log.reports()[-1][1].preemptions == 1


def test_priority_preempts_the_latest_deadline_not_the_latest_admitted() -> None:
    """As above, but it is r0 that has the later deadline, and the earlier place in the batch."""
    rows = workload([(0.0, 8, 9), (0.0, 8, 9)], slo_s=[50.0, 10.0])
    log, _ = run(rows, SIX_BLOCKS_OF_FOUR, EngineConfig(block_size=4, scheduling_policy="priority"))
    # r0, first in line, finds itself the lowest and goes. That ends the round: r1 is not served in that
    # step, which therefore has nothing to do, and is served in the next.
    assert log.finishes() == {"r0": 13.0, "r1": 9.0}


def test_nobody_is_admitted_in_an_iteration_that_preempted() -> None:
    """As above with r0 first in rank. r2, first of all, waits for its one block since 4.5 s. At 5 s r1
    gives up three and r0 takes one of them; r2 would fit, but has to wait for the step at 6 s."""
    rows = workload([(0.0, 8, 9), (0.0, 8, 9), (4.5, 2, 1)], slo_s=[20.0, 50.0, 1.0])
    log, _ = run(rows, SIX_BLOCKS_OF_FOUR, EngineConfig(block_size=4, scheduling_policy="priority"))
    assert log.first_tokens()["r2"] == 7.0
    assert log.finishes() == {"r0": 9.0, "r1": 13.0, "r2": 7.0}


def test_preempted_requests_go_ahead_of_those_that_never_ran() -> None:
    log, _ = run([(0.0, 8, 9), (0.0, 8, 9), (4.5, 2, 1)], SIX_BLOCKS_OF_FOUR, EngineConfig(block_size=4))
    assert log.first_tokens()["r2"] == 10.0, "r1 is back at 9 s, and r2 with it"


def test_priority_admits_the_earliest_deadline_first() -> None:
    rows = workload([(0.0, 8, 4), (1.0, 8, 2), (2.0, 8, 2)], slo_s=[50.0, 50.0, 10.0])
    one = instance(max_num_seqs=1)
    log, _ = run(rows, one, EngineConfig(scheduling_policy="priority"))
    assert log.first_tokens() == {"r0": 1.0, "r2": 5.0, "r1": 7.0}
    log, _ = run(rows, one)
    assert log.first_tokens() == {"r0": 1.0, "r1": 5.0, "r2": 7.0}


def test_output_ends_where_the_model_length_does() -> None:
    log, _ = run([(0.0, 90, 50)], instance(max_model_len=100))
    [(_, finished)] = log.of(RequestFinished)
    assert finished.output_tokens == 10
    assert log.finishes() == {"r0": 10.0}


def test_prompt_that_can_never_fit_fails_at_once_and_holds_up_nobody() -> None:
    log, end = run([(0.0, 200, 5), (0.0, 10, 2)], instance(kv_capacity_tokens=160))
    [(failed_at, failed)] = log.of(RequestFailed)
    assert (failed_at, failed.request_id) == (0.0, "r0")
    assert "200" in failed.reason
    assert "160" in failed.reason
    assert log.finishes() == {"r1": 2.0}
    assert end.unfinished == 0


def test_cost_of_an_iteration_has_every_term() -> None:
    """Prefill of 10 and 20 tokens together, then one decode of each, r0's last."""
    step = Step(base=1.0, token=0.25, seq_s=0.5, kv_token_s=0.125, prefill_pair_s=0.0625)
    log, _ = run([(0.0, 10, 2), (0.0, 20, 3)], instance(step=step))
    prefill = 1.0 + 0.25 * 30 + 0.5 * 2 + 0.0625 * (10 * 11 / 2 + 20 * 21 / 2)
    decode = 1.0 + 0.25 * 2 + 0.5 * 2 + 0.125 * (11 + 21)
    last = 1.0 + 0.25 + 0.5 + 0.125 * 22
    assert log.first_tokens() == {"r0": prefill, "r1": prefill}
    assert log.finishes() == {"r0": prefill + decode, "r1": prefill + decode + last}


def test_later_chunk_pays_for_attending_to_the_earlier_ones() -> None:
    step = Step(base=1.0, token=0.0, seq_s=0.0, kv_token_s=0.0, prefill_pair_s=1.0)
    log, _ = run([(0.0, 8, 1)], instance(step=step, max_num_batched_tokens=5, max_num_seqs=1))
    assert log.finishes() == {"r0": 2.0 + 8 * 9 / 2}


def test_perturbed_engine_is_slower_by_the_factor() -> None:
    plain, _ = run([(0.0, 100, 50)], instance(step=Step()))
    slow, _ = run([(0.0, 100, 50)], instance(step=Step()), perturb=1.5)
    assert slow.finishes()["r0"] == pytest.approx(1.5 * plain.finishes()["r0"])
    for name, factor in (("i0", 1.5), ("i1", 1.0)):
        one, _ = run([(0.0, 100, 50)], instance(step=Step()), perturb={name: 1.5})
        assert one.finishes()["r0"] == pytest.approx(factor * plain.finishes()["r0"])


def test_fewer_tokens_than_sequences_are_refused() -> None:
    with pytest.raises(InputError, match="max_num_batched_tokens = 8 is less than max_num_seqs = 16"):
        run([], instance(models={"m": model(SECOND, max_num_batched_tokens=8, max_num_seqs=16)}))
