"""What requests have in common: the text that tells it, Mooncake's hash ids, and conversations in a mix."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from workload.test_mix import build, trace_of

from qlm_sim.cluster.prefix_cache import keys
from qlm_sim.errors import InputError
from qlm_sim.workload.content import contents, parse_content
from qlm_sim.workload.mix import MixEntry
from qlm_sim.workload.readers import read_trace
from qlm_sim.workload.workload import Trace

runs = st.tuples(st.sampled_from("ab"), st.integers(1, 9)).map(lambda run: f"{run[0]}:{run[1]}")
texts = st.tuples(st.lists(runs, max_size=4), st.sampled_from(["", "a", "b"])).map(
    lambda parts: " ".join([*parts[0], parts[1]]).strip()
)


def tokens(request_id: str, text: str, count: int) -> list[tuple[str, int]]:
    """The tokens that a content speaks of, spelt out: stream and place in it."""
    spelt: list[tuple[str, int]] = []
    for stream, length in [*parse_content(text), (f"own {request_id}", None)]:
        spelt += [(stream, place) for place in range(count if length is None else length)]
    return spelt[:count]


@given(st.lists(texts, min_size=2, max_size=2), st.integers(1, 6))
def test_blocks_of_one_key_hold_the_same_tokens(pair: list[str], size: int) -> None:
    """The other way round too, where no stream is cut in two runs that go on as one."""
    first, second = contents(["r0", "r1"], pair)
    blocks = 48 // size
    ours = list(keys(first, size, 0, blocks))
    theirs = list(keys(second, size, 0, blocks))
    spelt = [tokens(each, text, 48) for each, text in zip(("r0", "r1"), pair, strict=True)]
    for number in range(blocks):
        end = (number + 1) * size
        if ours[number] == theirs[number]:
            assert spelt[0][:end] == spelt[1][:end]
        assert list(keys(first, size, number, blocks)) == ours[number:], "wherever the asking starts"
    assert (pair[0] == pair[1] and pair[0][-1:].isalpha()) <= (ours == theirs)


def test_conversations_and_common_beginnings_have_the_same_keys() -> None:
    first, second, third = contents("abc", ["system:32 talk", "system:32 talk:40 chat", "system:32 chat"])
    ours, theirs, others = (list(keys(each, 16, 0, 6)) for each in (first, second, third))
    assert ours[:4] == theirs[:4]
    assert ours[4] != theirs[4], "the fifth block, to token 80, ends in the other stream from token 72 on"
    assert ours[:2] == others[:2]
    assert ours[2] != others[2]


@pytest.mark.parametrize(
    ("text", "wrong"), [("a b", "after 'a'"), ("a:0", "'a:0'"), ("a:x b", "'a:x'"), (":5", "':5'")]
)
def test_bad_content_is_blamed_on_its_line(tmp_path, text, wrong):
    path = tmp_path / "t.csv"
    path.write_text(f"prompt_tokens,output_tokens,content\n5,5,talk\n5,5,{text}\n")
    with pytest.raises(InputError, match="line 3: content is") as error:
        read_trace(str(path), warn=pytest.fail)
    assert wrong in str(error.value)


def mooncake(tmp_path, *rows):
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(
            json.dumps({"timestamp": 0, "input_length": length, "output_length": 1, "hash_ids": ids}) + "\n"
            for length, ids in rows
        )
    )
    warnings: list[str] = []
    return read_trace(str(path), warn=warnings.append), warnings


def test_hash_ids_stand_for_512_tokens_each_or_for_another_number_that_fits_all(tmp_path):
    trace, warnings = mooncake(tmp_path, (1100, [7, 8, 9]), (512, [7]), (600, [7]))
    assert trace.content == ["7:512 8:512 9:76", "7:512", "7:512"]
    trace, _ = mooncake(tmp_path, (100, [1, 2, 3, 4]), (64, [1, 2]))
    assert trace.content == ["1:32 2:32 3:32 4:4", "1:32 2:32"]
    assert warnings == []
    trace, warnings = mooncake(tmp_path, (100, [1, 2, 3, 4]), (64, [1]))
    assert trace.content is None
    assert "hash_ids" in warnings[0]


def talks(count: int, turns: int) -> Trace:
    """Conversations whose n-th turns have 10 n prompt tokens."""
    return Trace(
        "t",
        [f"{talk}/{turn}" for talk in range(count) for turn in range(turns)],
        np.array([10 * (turn + 1) for _ in range(count) for turn in range(turns)]),
        np.ones(count * turns, dtype=np.int64),
        content=[f"talk{talk}" for talk in range(count) for _ in range(turns)],
    )


def test_turns_are_drawn_in_any_order_but_asked_in_theirs():
    workload, _ = build(talks(20, 5), seed=3)
    for model in range(2):
        for talk in range(20):
            turns = [
                prompt
                for prompt, content, each in zip(
                    workload.prompt_tokens.tolist(),
                    workload.content,
                    workload.model_index.tolist(),
                    strict=True,
                )
                if content == f"talk{talk}" and each == model
            ]
            assert turns == sorted(turns)
    assert sorted(workload.ids) == sorted(talks(20, 5).ids)
    names = [request_id.partition("/")[0] for request_id in workload.ids]
    assert [f"talk{name}" for name in names] == workload.content, "a request keeps its own content"


def test_a_trace_used_twice_is_alike_but_of_other_tokens():
    workload, _ = build(talks(4, 3), requests=24)
    assert sum(text.endswith("#2") for text in workload.content) == 12
    assert {text.partition("#")[0] for text in workload.content} == {f"talk{talk}" for talk in range(4)}


def test_a_prompt_of_the_mixs_own_length_is_like_no_other():
    mix = (MixEntry("small", "interactive", 1.0, prompt_tokens=(500, 600)),)
    workload, _ = build(talks(4, 3), mix=mix)
    assert set(workload.content) == {""}
    assert build(trace_of(5))[0].content is None
