"""The picture of what each instance held, and when it swapped and evicted: one panel per policy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlm_sim.metrics.run import PolicyRun
from qlm_sim.metrics.series import InstanceTimeline
from qlm_sim.report.style import FAINT_INK, INK, MODEL_COLOURS, new_figure
from qlm_sim.report.time_axis import set_time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_INSTANCES = 24
_MOST_VECTOR_SHAPES = 3000
"""With more, shapes are drawn as pixels, so that a picture of a long run stays small."""
_EVICTION_BINS = 300


def draw_timeline(runs: Sequence[PolicyRun]) -> "Figure":
    """Draw up to MOST_INSTANCES instances of each run."""
    from matplotlib.patches import Patch

    shown = {run.name: list(run.timelines)[:MOST_INSTANCES] for run in runs}
    rows = [max(1, len(names)) for names in shown.values()]
    row_in = 0.24 if max(rows) <= 10 else 0.15
    height_in = 1.1 + sum(row_in * count + 0.45 for count in rows)
    figure = new_figure(height_in, "Models, swaps and evictions of each instance")
    panels = figure.subplots(len(runs), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    models = sorted({m for run in runs for t in run.timelines.values() for m in t.models if m})
    colours = {model: MODEL_COLOURS[i % len(MODEL_COLOURS)] for i, model in enumerate(models)}
    for axes, run in zip(panels, runs, strict=True):
        names = shown[run.name]
        shapes = sum(
            2 * len(run.timelines[name].models) + min(_EVICTION_BINS, len(run.timelines[name].evicted_s))
            for name in names
        )
        for row, name in enumerate(names):
            _draw_instance(axes, row, run.timelines[name], run.end_s, colours, shapes > _MOST_VECTOR_SHAPES)
        axes.set_yticks(range(len(names)), names, fontsize=8 if row_in > 0.2 else 6)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(length=0)
        axes.grid(visible=False, axis="y")
        axes.set_title(_panel_title(run, len(names)), fontweight="normal")
    set_time_axis(panels[-1], runs)
    handles = [Patch(color=colours[model], label=model) for model in models]
    handles.append(Patch(color=INK, label="swapping"))
    figure.legend(handles=handles, loc="outside lower left", ncols=4)
    return figure


def _panel_title(run: PolicyRun, shown: int) -> str:
    title = f"{run.name}: {run.summary['swaps']:,} swaps, {run.summary['evictions']:,} evictions"
    if shown < len(run.timelines):
        title += f" (the first {shown} of {len(run.timelines)} instances are drawn)"
    return title


def _draw_instance(
    axes: "Axes",
    row: int,
    timeline: InstanceTimeline,
    end_s: float,
    colours: dict[str, str],
    as_pixels: bool,
) -> None:
    """A bar in each model's colour until the next swap begins, dark while it swaps, ticks for evictions."""
    bar = (row - 0.36, 0.62)
    swap_from_s = timeline.loaded_s - timeline.swap_s
    held_until_s = np.append(swap_from_s[1:], max(end_s, *timeline.loaded_s[-1:], 0.0))
    held = np.column_stack((timeline.loaded_s, held_until_s - timeline.loaded_s))
    for model in dict.fromkeys(timeline.models):
        if model:
            spans = held[[name == model for name in timeline.models]].tolist()
            axes.broken_barh(spans, bar, facecolors=colours[model], linewidth=0, rasterized=as_pixels)
    swapping = timeline.swap_s > 0
    if swapping.any():
        spans = np.column_stack((swap_from_s, timeline.swap_s))[swapping].tolist()
        axes.broken_barh(spans, bar, facecolors=INK, linewidth=0, rasterized=as_pixels)
    if len(timeline.evicted_s):
        counts, edges_s = np.histogram(timeline.evicted_s, _EVICTION_BINS, (0.0, max(end_s, 1e-9)))
        middles_s = (edges_s[:-1] + edges_s[1:])[counts > 0] / 2
        axes.vlines(middles_s, row + 0.28, row + 0.44, colors=FAINT_INK, linewidth=1.2, rasterized=as_pixels)
