"""The time that figures show: all of it, unless one run drags on so long that the others become a sliver."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.comparison import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST_IN_MEDIANS = 2.5


def set_time_axis(axes: "Axes", runs: Sequence[PolicyRun]) -> None:
    """Limit and label the time axis, and say so where a run goes on beyond it."""
    ends_s = [run.end_s for run in runs] or [1.0]
    shown_s = min(max(ends_s), _LONGEST_IN_MEDIANS * median(ends_s)) or 1.0
    beyond = [f"{run.name} ({run.end_s:,.0f} s)" for run in runs if run.end_s > shown_s]
    axes.set_xlim(0, shown_s)
    axes.set_xlabel("time (s)" + (f"; not shown to the end: {listed(beyond)}" if beyond else ""))
