"""What is written reads back the same."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.core.types import SloClass
from qlm_sim.errors import InputError
from qlm_sim.workload.readers import read_trace
from qlm_sim.workload.workload import Trace, Workload
from qlm_sim.workload.writers import SUFFIXES, write_trace

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
LENGTHS = st.integers(1, 10**9)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    ids = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    models = tuple(draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)))
    slos = tuple(SloClass(name, 1.0) for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)))

    def column(values: st.SearchStrategy[float], kind: type = np.int64) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=len(ids), max_size=len(ids))), dtype=kind)

    output = column(LENGTHS)
    return Workload(
        ids=ids,
        arrival_s=np.sort(column(st.floats(0, 1e9), np.float64)),
        prompt_tokens=column(LENGTHS),
        output_tokens=output,
        max_tokens=np.maximum(output, column(LENGTHS)),
        models=models,
        model_index=column(st.integers(0, len(models) - 1)),
        slo_classes=slos,
        slo_index=column(st.integers(0, len(slos) - 1)),
        content=draw(
            st.none() | st.lists(st.sampled_from(["", "talk", "a:5 b"]), min_size=len(ids), max_size=len(ids))
        ),
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40, deadline=None)
@given(workload=workloads())
def test_workload_reads_back_the_same(tmp_path_factory, suffix, workload):
    path = tmp_path_factory.mktemp("w") / f"t{suffix}"
    write_trace(workload, path)
    trace = read_trace(str(path), warn=pytest.fail)
    assert list(trace.ids) == list(workload.ids)
    assert trace.arrival_s.tolist() == workload.arrival_s.tolist()
    assert trace.prompt_tokens.tolist() == workload.prompt_tokens.tolist()
    assert trace.output_tokens.tolist() == workload.output_tokens.tolist()
    assert trace.max_tokens.tolist() == workload.max_tokens.tolist()
    assert trace.model == [workload.models[i] for i in workload.model_index]
    assert trace.content == workload.content
    assert trace.slo_class == [workload.slo_classes[i].name for i in workload.slo_index]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_trace_keeps_what_it_does_not_say_open(tmp_path, suffix):
    trace = Trace("t", ["a", "b"], np.array([1, 2]), np.array([3, 4]), model=["m", ""])
    write_trace(trace, tmp_path / f"t{suffix}")
    again = read_trace(str(tmp_path / f"t{suffix}"), warn=pytest.fail)
    assert (again.arrival_s, again.slo_class, again.max_tokens) == (None, None, None)
    assert again.model == ["m", ""]
    assert again.content is None
    write_trace(again, tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"t{suffix}").read_bytes()


def test_json_line_is_one_request(tmp_path):
    write_trace(Trace("t", ["a"], np.array([1]), np.array([3])), tmp_path / "t.jsonl")
    assert json.loads((tmp_path / "t.jsonl").read_text()) == {
        "id": "a",
        "prompt_tokens": 1,
        "output_tokens": 3,
    }


def test_file_that_cannot_be_written_is_one_clear_line_and_leaves_nothing(tmp_path):
    trace = Trace("t", ["a"], np.array([1]), np.array([3]))
    (tmp_path / "taken.csv").mkdir()
    for name in ("absent/t.csv", "taken.csv", "t.xlsx"):
        with pytest.raises(InputError, match=name):
            write_trace(trace, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.csv"]
