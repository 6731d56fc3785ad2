"""The result directory: complete or absent, the same bytes for the same runs, never over foreign files."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qlm_sim.errors import InputError
from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.write import check_output, summary_json, write_results

FILES = {
    "summary.json",
    "requests.parquet",
    "plans.jsonl",
    "report.html",
    "attainment.png",
    "ttft.png",
    "load.png",
    "queue_by_class.png",
    "timeline.png",
}


def write(folder: Path, runs) -> None:
    write_results(
        folder,
        runs,
        {"name": "test", "seed": 7, "ratio": 1 / 3},
        title="a <title> & more",
        command="qlm-sim replay trace.json --seed 7",
        scenario_toml='name = "test"  # <b>not bold</b>\n',
        notes=["The trace was cut off <here>."],
    )


@pytest.fixture(scope="module")
def result(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "runs" / "first"
    write(folder, runs)
    return folder


def test_all_files_and_no_others_are_written(result):
    assert {path.name for path in result.iterdir()} == FILES
    assert [path.name for path in result.parent.iterdir()] == ["first"]  # nothing left beside it


def test_the_same_runs_give_the_same_bytes(result, runs, tmp_path):
    write(tmp_path / "second", runs)
    for name in FILES:
        assert (result / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_summary_json_is_strict_and_rounded(result):
    def no_constants(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads((result / "summary.json").read_text(), parse_constant=no_constants)
    assert set(document) == {"scenario", "policies"}
    assert document["scenario"]["ratio"] == 1 / 3  # every digit, to repeat the run
    figures = document["policies"]["qlm"]
    counts = {"requests", "finished", "unfinished", "rejected", "swaps", "evictions", "preemptions"}
    rates = {"throughput_rps", "goodput_rps", "output_tokens_per_s", "gpu_utilization", "makespan_s"}
    for key in counts | rates:
        assert isinstance(figures[key], int if key in counts else float), key
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        assert set(figures[key]) == {"mean", "p50", "p90", "p95", "p99"}
    assert set(figures["slo_attainment"]["by_class"]) == {"interactive", "batch-1", "batch-2"}


def test_no_value_is_null(runs):
    nothing = PolicyRun(**vars(runs[0]) | {"summary": {"ttft_s": {"p99": math.nan}, "goodput_rps": None}})
    assert json.loads(summary_json([nothing], {}))["policies"]["vllm"] == {
        "ttft_s": {"p99": None},
        "goodput_rps": None,
    }


def test_rows_agree_with_the_summary(result, runs):
    rows = pd.read_parquet(result / "requests.parquet")
    document = json.loads((result / "summary.json").read_text())
    assert list(rows.policy.unique()) == [run.name for run in runs]
    for name, figures in document["policies"].items():
        own = rows[rows.policy == name]
        counts = own.status.value_counts()
        assert len(own) == figures["requests"]
        assert counts.get("finished", 0) == figures["finished"]
        assert counts.get("unfinished", 0) == figures["unfinished"]
        assert counts.get("rejected", 0) + counts.get("failed", 0) == figures["rejected"]
        assert own.slo_met.mean() == pytest.approx(figures["slo_attainment"]["overall"])
        assert not own.slo_met[own.status != "finished"].any()
        assert own.evictions.sum() == figures["evictions"]
        for key in ("ttft_s", "tpot_s", "e2e_s"):
            assert np.percentile(own[key].dropna(), 99) == pytest.approx(figures[key]["p99"])
        assert own.arrival_s.is_monotonic_increasing
        for slo_class, share in figures["slo_attainment"]["by_class"].items():
            assert own.slo_met[own.slo_class == slo_class].mean() == pytest.approx(share)


def test_long_runs_are_written_in_row_groups(runs, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    from qlm_sim.metrics import parquet

    monkeypatch.setattr(parquet, "_ROW_GROUP", 100)
    parquet.write_requests(tmp_path / "requests.parquet", runs)
    assert pq.ParquetFile(tmp_path / "requests.parquet").num_row_groups == sum(
        -(-len(run.requests) // 100) for run in runs
    )
    assert list(pd.read_parquet(tmp_path / "requests.parquet").id) == [
        i for run in runs for i in run.requests.ids
    ]


class _Page(HTMLParser):
    VOID = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_one_well_formed_page_that_fetches_nothing(result):
    source = (result / "report.html").read_text()
    page = _Page()
    page.feed(source)
    assert page.open == []
    assert page.sources
    assert all(address.startswith("data:") for address in page.sources)
    assert "http://" not in source
    assert "https://" not in source
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import", source)


def test_report_escapes_what_it_is_given_and_tells_how_to_repeat(result):
    source = (result / "report.html").read_text()
    page = _Page()
    page.feed(source)
    assert "<b>" not in source
    assert "a <title> & more" in page.text
    assert 'name = "test"  # <b>not bold</b>' in page.text
    assert "qlm-sim replay trace.json --seed 7" in page.text
    assert "The trace was cut off <here>." in page.text


def test_an_earlier_result_is_replaced(result, runs, tmp_path):
    folder = tmp_path / "again"
    write(folder, runs[:1])
    write(folder, runs)
    assert (folder / "summary.json").read_bytes() == (result / "summary.json").read_bytes()


def test_a_directory_that_is_not_ours_is_left_alone(runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        write(tmp_path, runs)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        check_output(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "out")
    with pytest.raises(InputError, match="cannot be written"):
        check_output(tmp_path / "out" / "deeper")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_refused_before_the_run(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        check_output(tmp_path / "out")


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_breaks_off_leaves_no_half_written_result(runs, tmp_path, monkeypatch, trouble):
    def break_off(*_: object) -> str:
        raise trouble

    monkeypatch.setattr("qlm_sim.report.write.report_html", break_off)
    with pytest.raises((InputError, KeyboardInterrupt)):
        write(tmp_path / "out", runs)
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_and_pyarrow_are_imported_only_when_results_are_written():
    code = "import sys, qlm_sim.report.write; print({'matplotlib', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_pictures_and_summaries_of_others_are_left_alone(runs, tmp_path):
    write(tmp_path / "out", runs)
    (tmp_path / "out" / "holiday.png").write_bytes(b"sea")
    with pytest.raises(InputError, match=r"holiday\.png"):
        write(tmp_path / "out", runs)
    other = tmp_path / "other"
    other.mkdir()
    (other / "summary.json").write_text('{"score": 1}')
    with pytest.raises(InputError, match=r"holds summary\.json and no summary\.json of a run"):
        check_output(other)
