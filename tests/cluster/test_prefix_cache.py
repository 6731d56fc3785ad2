"""Prefix caching, computed by hand: what is found, what it saves, and when it is gone.

An iteration takes one second and as much again for each 1024 query-key pairs, unless said otherwise.
Whether vLLM's scheduler does the same, step by step, is test_vllm_oracle's matter.
"""

from collections.abc import Sequence

import pytest
from cluster.lab import SECOND, Log, Push, Step, instance, model, run, workload
from cluster.test_operations import Told

from qlm_sim.core.actions import Action, Evict, Pull, SwapModel
from qlm_sim.core.events import FirstToken
from qlm_sim.core.types import InstanceSpec
from qlm_sim.models.engine_config import EngineConfig

ON = EngineConfig(block_size=16, enable_prefix_caching=True)
OFF = EngineConfig(block_size=16)


def serve(
    rows: Sequence[tuple[float, int, int]],
    content: Sequence[str],
    config: EngineConfig = ON,
    timetable: dict[float, list[Action]] | None = None,
    one: InstanceSpec | None = None,
) -> Log:
    one = one or instance()
    core = Push([one]) if timetable is None else Told(timetable)
    log, end = run(workload(rows, content=content), one, config, core)
    assert end.unfinished == 0
    return log


def found(log: Log) -> tuple[int, int]:
    """(tokens found, tokens looked up)."""
    report = log.reports()[-1][1]
    return report.prefix_hits, report.prefix_queries


def test_turns_of_a_conversation_find_the_turns_before() -> None:
    """100 + 30 tokens; then these and 70 new ones, + 20; then these and 44 new ones.

    Computed are all but a turn's last token: 129 and 219, so 8 and 13 whole blocks of 16 are found.
    """
    rows = [(0.0, 100, 30), (100.0, 200, 20), (200.0, 264, 5)]
    log = serve(rows, ["talk"] * 3)
    assert found(log) == (0 + 128 + 208, 100 + 200 + 264)


def test_a_hit_brings_the_first_token_forward_by_what_it_need_not_compute() -> None:
    """Of 200 tokens, 128 are found and 72 computed, at 1 / 32 s each, in one iteration of 1 s."""
    one = instance(step=Step(base=1.0, token=1 / 32, seq_s=0.0, kv_token_s=0.0, prefill_pair_s=0.0))
    rows = [(0.0, 100, 30), (100.0, 200, 20)]
    warm = serve(rows, ["talk"] * 2, ON, one=one).first_tokens()
    cold = serve(rows, ["talk"] * 2, OFF, one=one).first_tokens()
    apart = serve(rows, ["talk", "chat"], ON, one=one).first_tokens()
    assert warm["r1"] - 100.0 == 1.0 + 72 / 32
    assert cold["r1"] - 100.0 == apart["r1"] - 100.0 == 1.0 + 200 / 32
    assert warm["r0"] == cold["r0"] == apart["r0"]


def test_tokens_found_are_attended_to_all_the_same() -> None:
    one = instance(step=Step(base=0.0, token=0.0, seq_s=0.0, kv_token_s=0.0, prefill_pair_s=1.0))
    log = serve([(0.0, 32, 1), (10_000.0, 40, 1)], ["talk"] * 2, one=one)
    assert log.first_tokens()["r1"] - 10_000.0 == sum(range(33, 41))


def test_a_whole_prompt_that_is_known_computes_its_last_block_anew() -> None:
    assert found(serve([(0.0, 64, 2), (50.0, 64, 2)], ["same:64"] * 2)) == (48, 128)
    assert found(serve([(0.0, 65, 2), (50.0, 65, 2)], ["same:65"] * 2)) == (64, 130)


def test_only_whole_blocks_from_the_start_on_are_found() -> None:
    """Alike are: the first 50 of 100 tokens, the first 100 and the next 50, nothing."""
    assert found(serve([(0.0, 100, 2), (50.0, 100, 2)], ["system:50 a", "system:50 b"])) == (48, 200)
    assert found(serve([(0.0, 200, 2), (50.0, 160, 2)], ["system:100 a:50", "system:100 a:50 b"])) == (
        144,
        360,
    )
    assert found(serve([(0.0, 100, 2), (50.0, 100, 2)], ["a:20 system:80", "b:20 system:80"])) == (0, 200)
    assert found(serve([(0.0, 100, 2), (50.0, 100, 2)], ["", ""])) == (0, 200)


def test_blocks_are_found_as_soon_as_they_are_full_even_in_the_same_iteration() -> None:
    log = serve([(0.0, 64, 20), (0.0, 80, 3)], ["talk"] * 2)
    assert found(log) == (64, 144)
    assert log.first_tokens() == {"r0": 1.0, "r1": 1.0}


def test_the_longest_unused_blocks_give_way_first_and_of_a_request_the_last_first() -> None:
    """Eight blocks. Two requests leave three full ones each; a third needs four, so two are evicted: the last
    ones of the first request. Its first block is still there afterwards, and the second request's three."""
    one = instance(kv_capacity_tokens=8 * 16)
    rows = [(0.0, 48, 1), (10.0, 48, 1), (20.0, 60, 4)]
    before = found(serve(rows, ["a", "b", "c"], one=one))
    assert before == (0, 156)
    again_a = found(serve([*rows, (40.0, 49, 1)], ["a", "b", "c", "a"], one=one))
    again_b = found(serve([*rows, (40.0, 49, 1)], ["a", "b", "c", "b"], one=one))
    assert (again_a[0], again_b[0]) == (16, 48)


def test_a_request_shares_blocks_instead_of_taking_its_own() -> None:
    """Ten blocks: two requests of six blocks fit at once where they share five, and only there."""
    one = instance(kv_capacity_tokens=10 * 16)
    rows = [(0.0, 90, 6), (1.5, 90, 6)]
    assert serve(rows, ["system:80 a", "system:80 b"], one=one).first_tokens() == {"r0": 1.0, "r1": 3.0}
    assert serve(rows, ["a", "b"], one=one).first_tokens() == {"r0": 1.0, "r1": 7.0}


def test_a_preempted_request_finds_its_own_blocks() -> None:
    """Seven blocks of four; as without caching r1 is preempted at 5 s and back at 9 s, but of its 13 tokens
    only the last is computed. Preempted ones do not count among those looked up."""
    one = instance(kv_capacity_tokens=28, step=Step(1.0, 1 / 16, 0.0, 0.0, 0.0))
    rows = [(0.0, 8, 12), (0.0, 8, 12)]
    with_cache = serve(rows, ["", ""], EngineConfig(block_size=4, enable_prefix_caching=True), one=one)
    without = serve(rows, ["", ""], EngineConfig(block_size=4), one=one)
    assert with_cache.reports()[-1][1].preemptions == without.reports()[-1][1].preemptions == 1
    assert found(with_cache) == (0, 16)
    assert with_cache.finishes()["r1"] < without.finishes()["r1"]


def test_an_evicted_request_finds_its_own_blocks_where_it_resumes() -> None:
    """40 prompt tokens; evicted at 10 s with 10 generated, 9 of them computed: 49 tokens, three blocks."""
    timetable: dict[float, list[Action]] = {
        9.5: [Evict("r0", 1, "i0", False)],
        20.0: [Pull("r0", 2, "i0")],
    }
    log = serve([(0.0, 40, 30)], [""], timetable=timetable)
    assert found(log) == (48, 40 + 50)
    assert log.times(FirstToken)["r0"] == [1.0, 21.0]


def test_another_model_takes_the_cache_away() -> None:
    rows = workload(
        [(0.0, 100, 5), (50.0, 100, 5), (100.0, 100, 5)], ["m", "m", "m"], content=["talk", "talk", "talk"]
    )
    both = instance(models={"m": model(SECOND), "n": model(SECOND)}, host_models=("n",))
    timetable: dict[float, list[Action]] = {
        60.0: [SwapModel("i0", "n")],
        70.0: [SwapModel("i0", "m")],
    }
    log, _ = run(rows, both, ON, Told(timetable))
    assert found(log) == (96, 300), "the second request finds the first's blocks, the third nothing"


@pytest.mark.parametrize("engine", ["leap", "stepping"])
def test_a_blocked_head_is_admitted_when_a_running_request_fills_what_it_needs(engine: str) -> None:
    """Seven blocks of 16, of which r0 (40 tokens) holds three, r1 two. r2 goes on from what r0 generates: of
    its five blocks two are found, and two are free. r0's 48th token, in the iteration that begins at 8 s,
    fills the third that it needs; nobody comes or goes then."""
    rows = workload([(0.0, 40, 30), (0.0, 20, 30), (2.0, 70, 2)], content=["talk", "", "talk"])
    log, _ = run(rows, instance(kv_capacity_tokens=7 * 16), ON, engine=engine)
    assert log.first_tokens()["r2"] == 9.0
