"""The time axis shows every run whole, unless one would squeeze the others."""

from dataclasses import dataclass

from matplotlib.figure import Figure

from qlm_sim.report.time_axis import set_time_axis


@dataclass
class Run:
    name: str
    end_s: float


def axis(*ends_s):
    axes = Figure().subplots()
    set_time_axis(axes, [Run(f"p{i}", end_s) for i, end_s in enumerate(ends_s)])
    return axes.get_xlim()[1], axes.get_xlabel()


def test_runs_of_like_length_are_shown_whole():
    assert axis(90.0, 100.0, 200.0) == (200.0, "time (s)")
    assert axis(70.0) == (70.0, "time (s)")


def test_run_that_drags_on_is_cut_and_named():
    shown_s, label = axis(90.0, 100.0, 5000.0)
    assert shown_s == 250.0
    assert label == "time (s); not shown to the end: p2 (5,000 s)"


def test_runs_of_no_length_have_an_axis():
    assert axis(0.0, 0.0)[0] > 0
