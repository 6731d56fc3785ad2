"""Workloads made of traces: what is kept, what is drawn, and what one seed fixes."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.core.types import SloClass
from qlm_sim.errors import InputError
from qlm_sim.workload.mix import MixEntry, build_workload
from qlm_sim.workload.workload import Trace, Workload

CLASSES = (SloClass("interactive", 20.0), SloClass("batch", 60.0))
LENGTHS = {"small": 1000, "large": 100_000}
MIX = (MixEntry("small", "interactive", 1.0), MixEntry("large", "batch", 3.0))


def trace_of(count: int, **columns: object) -> Trace:
    rng = np.random.default_rng(count)
    return Trace(
        "t",
        [f"r{i}" for i in range(count)],
        rng.integers(1, 1200, count),
        rng.integers(1, 400, count),
        **columns,  # type: ignore[arg-type]
    )


def build(trace: Trace, **changes: object) -> tuple[Workload, list[str]]:
    arguments: dict[str, object] = {
        "mix": MIX,
        "slo_classes": CLASSES,
        "arrivals": "poisson",
        "rate_rps": 2.0,
        "requests": None,
        "seed": 1,
        "max_model_len": LENGTHS,
    }
    return build_workload(trace, **(arguments | changes))  # type: ignore[arg-type]


def columns(workload: Workload) -> list[list[object]]:
    arrays = (workload.arrival_s, workload.prompt_tokens, workload.output_tokens, workload.max_tokens)
    return [list(workload.ids), *(a.tolist() for a in (*arrays, workload.model_index, workload.slo_index))]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(5, 200),
    requests=st.one_of(st.none(), st.integers(1, 500)),
    seed=st.integers(0, 2**32),
    arrivals=st.sampled_from(["poisson", "gamma:2", "uniform", "trace"]),
    rate_rps=st.floats(0.01, 1000),
    named=st.booleans(),
    mega=st.booleans(),
    own_rate=st.sampled_from([None, 5.0]),
)
def test_laws_of_every_workload(rows, requests, seed, arrivals, rate_rps, named, mega, own_rate):
    trace = trace_of(
        rows, arrival_s=np.arange(rows) * 0.5, model=(["small", "", "large"] * rows)[:rows] if named else None
    )
    trace = replace(trace, prompt_tokens=np.where(np.arange(rows) % 4 < 3, 5, trace.prompt_tokens))
    mix = (MIX[0], replace(MIX[1], prompt_tokens=(3000, 4000) if mega else None, rate_rps=own_rate))
    workload, notes = build(
        trace, mix=mix, arrivals=arrivals, rate_rps=rate_rps, requests=requests, seed=seed
    )

    assert (np.diff(workload.arrival_s) >= 0).all()
    assert len(set(workload.ids)) == len(workload)
    assert (workload.prompt_tokens >= 1).all()
    limit = np.array([LENGTHS[model] for model in workload.models])[workload.model_index]
    assert (workload.prompt_tokens + workload.max_tokens <= limit).all()
    assert (workload.output_tokens <= workload.max_tokens).all()
    if requests is not None and arrivals != "trace":
        assert len(workload) == requests
    if arrivals == "trace":
        assert len(workload) <= rows
    if named:
        row_model = dict(zip(trace.ids, trace.model, strict=True))
        for request_id, model in zip(workload.ids, workload.model_index, strict=True):
            assert row_model[request_id.split("#")[0]] in ("", workload.models[model])
    again, again_notes = build(
        trace, mix=mix, arrivals=arrivals, rate_rps=rate_rps, requests=requests, seed=seed
    )
    assert columns(again) == columns(workload)
    assert again_notes == notes


def test_another_rate_leaves_the_requests_as_they_are():
    slow, _ = build(trace_of(300), rate_rps=1.0)
    fast, _ = build(trace_of(300), rate_rps=10.0)
    assert columns(slow)[1:] != columns(fast)[1:]
    assert [c for i, c in enumerate(columns(slow)) if i != 1] == [
        c for i, c in enumerate(columns(fast)) if i != 1
    ]
    assert slow.arrival_s == pytest.approx(fast.arrival_s * 10)


def test_more_requests_leave_the_first_ones_as_they_are():
    few, _ = build(trace_of(500), requests=100)
    many, _ = build(trace_of(500), requests=300)
    assert columns(few) == [column[:100] for column in columns(many)]


def test_another_seed_gives_other_requests():
    assert columns(build(trace_of(300), seed=1)[0]) != columns(build(trace_of(300), seed=2)[0])


def test_shares_hold_though_one_model_can_hold_less():
    workload, notes = build(trace_of(2000), requests=20_000)
    share = (workload.model_index == 0).mean()
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 20_000)
    assert any("for small (1,000 tokens)" in note for note in notes)


def test_rows_are_drawn_once_each_before_any_is_drawn_again():
    trace = trace_of(100)
    once, notes = build(trace, mix=MIX[1:], requests=100)
    assert sorted(once.ids) == sorted(trace.ids)
    assert notes == []
    twice, notes = build(trace, mix=MIX[1:], requests=250)
    uses = Counter(request_id.split("#")[0] for request_id in twice.ids)
    assert set(uses.values()) == {2, 3}
    assert any("250 requests are drawn from 100 of the trace" in note for note in notes)


def test_own_times_keep_order_and_take_the_first_that_fit():
    trace = replace(
        trace_of(5, arrival_s=np.array([0.0, 1.0, 4.0, 4.0, 9.0])), prompt_tokens=np.array([1, 2, 3, 4, 5])
    )
    long = replace(trace, output_tokens=np.array([1, 10**6, 1, 1, 1]))
    workload, notes = build(long, arrivals="trace", rate_rps=None, requests=3)
    assert list(workload.ids) == ["r0", "r2", "r3"]
    assert workload.arrival_s.tolist() == [0.0, 4.0, 4.0]
    assert len(notes) == 1
    assert notes[0].startswith("1 of 5 requests of the trace exceed their model's max_model_len")
    _, notes = build(trace, arrivals="trace", rate_rps=None, requests=9)
    assert notes == ["9 requests are asked for; the trace has 5, all are taken"]
    scaled, _ = build(trace, arrivals="trace", rate_rps=8.0)
    assert np.diff(scaled.arrival_s).mean() == pytest.approx(1 / 8)


def test_named_model_and_class_are_kept_and_the_rest_drawn_to_agree():
    trace = trace_of(400, model=["small", ""] * 200, slo_class=["", "batch"] * 200)
    trace = replace(trace, prompt_tokens=np.full(400, 9))
    workload, _ = build(trace)
    for request_id, model, slo in zip(workload.ids, workload.model_index, workload.slo_index, strict=True):
        even = int(request_id[1:]) % 2 == 0
        # The mix pairs small with interactive and large with batch, so each name decides the other.
        assert (workload.models[model], CLASSES[slo].name) == (
            ("small", "interactive") if even else ("large", "batch")
        )


def test_unknown_names_are_refused_unless_they_are_another_services():
    trace = trace_of(3, model=["small", "gpt-4", "small"])
    with pytest.raises(
        InputError, match=r"model 'gpt-4' \(request r1\) is not in the scenario, which has small, large"
    ):
        build(trace)
    _, notes = build(replace(trace, foreign_models=True))
    assert notes[0] == "model gpt-4 of the trace is not in the scenario: drawn from its mix"
    with pytest.raises(InputError, match="SLO class 'gold'"):
        build(trace_of(1, slo_class=["gold"]))


def test_mega_prompts_come_evenly_from_their_range():
    mix = (MIX[0], replace(MIX[1], prompt_tokens=(3000, 3009)))
    workload, _ = build(trace_of(500), mix=mix, requests=20_000)
    mega = workload.prompt_tokens[workload.model_index == 1]
    counts = np.bincount(mega - 3000, minlength=10)
    assert len(counts) == 10
    assert ((counts - len(mega) / 10) ** 2 / (len(mega) / 10)).sum() < 33.7  # chi-square, 9 degrees, p = 1e-4
    assert workload.prompt_tokens[workload.model_index == 0].max() < 1000


def test_entries_without_a_process_of_their_own_share_one():
    mix = (*MIX, MixEntry("large", "interactive", 4.0, arrivals="uniform", rate_rps=50.0))
    workload, _ = build(trace_of(2000), mix=mix, requests=8000, rate_rps=2.0)
    own = (workload.model_index == 1) & (workload.slo_index == 0)
    assert np.diff(workload.arrival_s[own]) == pytest.approx(1 / 50)
    joint_gaps = np.diff(workload.arrival_s[~own])
    # Half of the shares, so half of the whole rate of 2 requests/s.
    assert abs(joint_gaps.mean() - 1.0) < 4 / np.sqrt(len(joint_gaps))


def test_max_tokens_are_the_traces_or_what_the_model_leaves():
    trace = replace(trace_of(50), prompt_tokens=np.full(50, 10), output_tokens=np.full(50, 20))
    open_end, _ = build(trace, mix=MIX[:1])
    assert set(open_end.max_tokens.tolist()) == {990}
    bounded, _ = build(replace(trace, max_tokens=np.full(50, 25)), mix=MIX[:1])
    assert set(bounded.max_tokens.tolist()) == {25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrivals": "trace"}, "has no arrival times"),
        ({"rate_rps": None}, "need a rate"),
        ({"rate_rps": 0.0}, "above 0"),
        ({"requests": 0}, "1 or more"),
        ({"seed": -1}, "seed -1"),
        ({"mix": ()}, "the mix is empty"),
        (
            {"mix": (MixEntry("tiny", "batch", 1.0),)},
            "mix entry 1: model 'tiny' is unknown; known are small, large",
        ),
        ({"mix": (MixEntry("small", "gold", 1.0),)}, "mix entry 1: SLO class 'gold'"),
        ({"mix": (*MIX, MixEntry("small", "batch", 0.0))}, "mix entry 3: share 0"),
        ({"mix": (MixEntry("small", "batch", 1.0, arrivals="burst"),)}, "arrivals 'burst'"),
        ({"mix": (MixEntry("small", "batch", 1.0, arrivals="trace"),)}, "'trace' for both would be right"),
        ({"mix": (MixEntry("small", "batch", 1.0, prompt_tokens=(5, 2000)),)}, r"prompt_tokens \[5, 2000\]"),
        ({"max_model_len": {"small": 1, "large": 1}}, "no request fits max_model_len 1 of small"),
    ],
)
def test_impossible_wish_says_what_would_be_right(changes, message):
    with pytest.raises(InputError, match=message):
        build(trace_of(20), **changes)


def test_a_million_requests_take_seconds():
    started = time.perf_counter()
    workload, _ = build(trace_of(17_000), requests=1_000_000)
    assert len(workload) == 1_000_000
    assert time.perf_counter() - started < 20  # measured: 2 s; room for a busy machine
