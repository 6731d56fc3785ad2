"""Figures are drawn for any run, are not blank, and are the same bytes each time."""

from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.run import PolicyRun, conclude
from qlm_sim.metrics.series import InstanceTimeline
from qlm_sim.report.figures import pictures
from qlm_sim.report.style import house_style, line_styles
from qlm_sim.report.timeline import draw_timeline


@pytest.fixture(scope="module")
def drawn(runs):
    return pictures(runs)


def test_every_figure_has_ink_all_over(drawn):
    for picture in drawn:
        pixels = imread(BytesIO(picture.png))[..., :3]
        inked = (np.abs(pixels - 1).max(axis=-1) > 0.05).reshape(-1)
        assert 0.01 < inked.mean() < 0.9, picture.name
        columns = np.abs(pixels - 1).max(axis=(0, 2)) > 0.05
        assert columns[: len(columns) // 4].any(), picture.name
        assert columns[-len(columns) // 4 :].any(), picture.name


def test_the_same_runs_give_the_same_bytes(runs, drawn):
    for first, second in zip(drawn, pictures(runs), strict=True):
        assert first == second


def test_files_tell_no_date_and_no_maker(drawn):
    for picture in drawn:
        assert b"Software" not in picture.png
        assert b"tIME" not in picture.png
        assert "<dc:date>" not in picture.svg


def test_a_policy_keeps_its_colour_whatever_it_is_compared_with():
    alone = line_styles(["qlm"])["qlm"]
    assert line_styles(["edf", "qlm without eviction", "qlm"])["qlm"] == alone
    many = line_styles(["vllm", "edf", "shepherd", "qlm", "clairvoyant", "one", "two", "three"])
    assert len({style.colour for style in many.values()}) == len(many)


def test_a_run_without_requests_can_be_drawn(runs):
    empty = conclude("qlm", RunRecorder(), runs[0].slo_classes, end_s=0.0)
    assert len(pictures([empty])) == len(pictures(runs))


def test_long_and_wide_timelines_stay_small(runs, drawn):
    """60 instances with 2,000 swaps each: some are drawn, the rest is said to be left out."""
    run = runs[0]
    loaded_s = np.linspace(1, run.end_s, 2000)
    timeline = InstanceTimeline(loaded_s, ("a", "b") * 1000, np.full(2000, 0.05), loaded_s)
    wide = PolicyRun(**vars(run) | {"timelines": {f"i{n:02}": timeline for n in range(60)}})
    with house_style():
        draw_timeline([wide]).savefig(svg := BytesIO(), format="svg")
    assert b"the first 24 of 60 instances" in svg.getvalue()
    assert len(svg.getvalue()) < 1_000_000
