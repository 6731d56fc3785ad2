"""Wherever a stream is cut, and however its tokens came together, the text goes on without a seam."""

from hypothesis import given, settings
from hypothesis import strategies as st

from live.fake.language import generate, words
from live.transcript import Transcript, held_back

PROMPT = (7, 8, 9)


def chunks_of(tokens, sizes, hold):
    """(text, tokens) as an engine tells them: in groups, ``hold`` characters behind until the end."""
    texts = words(tokens)
    told, ready, at = 0, "", 0
    for size in [*sizes, len(tokens)]:
        group = tokens[at : at + size]
        if not group:
            return
        ready += "".join(texts[at : at + size])
        at += len(group)
        end = len(ready) if at == len(tokens) else max(told, len(ready) - hold)
        yield ready[told:end], group
        told = end


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(1, 30), max_size=4),
    sizes=st.lists(st.integers(1, 4), max_size=120),
    stop=st.sampled_from([None, "no such", ["x", "no such text"]]),
)
def test_a_stream_cut_anywhere_says_what_it_would_have(seed, cuts, sizes, stop):
    prompt = [*PROMPT, seed]
    body = {"temperature": 0} | ({"stop": stop} if stop else {})
    whole = generate("a", prompt, 100, 1e9, True)
    transcript = Transcript(body)
    said = ""
    for cut in [*cuts, None]:
        kept = transcript.cut()
        assert kept <= len(whole)
        assert transcript.token_ids == whole[:kept]
        rest = generate("a", prompt + transcript.token_ids, 100 - kept, 1e9, True)
        for number, (text, tokens) in enumerate(chunks_of(rest, sizes, held_back(body))):
            if number == cut:
                break
            said += transcript.add(text, tokens)
    assert said == "".join(words(whole))
    assert transcript.token_ids == whole


@given(seed=st.integers(0, 10_000), cut=st.integers(1, 60))
def test_a_checkpoint_goes_on_in_another_process(seed, cut):
    prompt = [*PROMPT, seed]
    whole = generate("a", prompt, 80, 1e9, True)
    first = Transcript({"temperature": 0})
    first.prompt_token_ids = tuple(prompt)
    said = ""
    for text, tokens in (
        list(chunks_of(whole, [], 0))[:1] if cut > 79 else list(chunks_of(whole, [1] * 79, 0))[:cut]
    ):
        said += first.add(text, tokens)
    resume = first.checkpoint(said)
    assert resume is not None
    again = Transcript({"temperature": 0}, resume)
    rest = generate("a", [*resume.prompt_token_ids, *resume.token_ids], 80 - len(resume.token_ids), 1e9, True)
    for text, tokens in chunks_of(rest, [], 0):
        said += again.add(text, tokens)
    assert said == "".join(words(whole))


def test_an_engine_that_tells_no_tokens_cannot_be_left():
    transcript = Transcript({"temperature": 0})
    assert transcript.add("hello", ()) == "hello"
    assert not transcript.resumable
    assert transcript.checkpoint("hello") is None


def test_as_much_is_held_back_as_the_longest_stop_string_but_one():
    assert held_back({}) == held_back({"stop": []}) == held_back({"stop": "x"}) == 0
    assert held_back({"stop": ["ab", "abcd"]}) == 3
    assert held_back({"stop": "abcd", "include_stop_str_in_output": True}) == 0
