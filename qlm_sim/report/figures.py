"""The figures of a report, drawn from concluded runs. matplotlib is imported only to draw.

The same runs give the same bytes: no date, no version, no random names in any file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.comparison import percent, targets
from qlm_sim.report.style import FAINT_INK, INK, PAPER, house_style, line_styles, new_figure
from qlm_sim.report.time_axis import set_time_axis
from qlm_sim.report.timeline import draw_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UTILIZATION_BINS = 100
_LEGEND_COLUMNS = 6


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure, as files hold it."""

    name: str
    caption: str
    png: bytes
    svg: str


def pictures(runs: Sequence[PolicyRun]) -> list[Picture]:
    """Every figure of the report, in its order."""
    drawings: list[tuple[str, str, Callable[[Sequence[PolicyRun]], Figure]]] = [
        (
            "attainment",
            "Share of all requests that finished within their class's targets. Unfinished and rejected "
            "requests count as missed.",
            _attainment,
        ),
        (
            "ttft",
            "Share of a class's requests that had their first token within the time on the x axis (log "
            "scale). The dotted line is the TTFT target; a curve that ends below 100% leaves requests "
            "without any token.",
            _ttft,
        ),
        (
            "load",
            "Requests waiting for a token, engines executing, and KV cache in use, over time. The dotted "
            "line marks the last arrival.",
            _load,
        ),
        (
            "queue_by_class",
            "Requests waiting for a token, by SLO class, over time. All panels share one scale.",
            _queue_by_class,
        ),
        (
            "timeline",
            "The model that each instance held over time. Ticks below a bar are evictions.",
            draw_timeline,
        ),
    ]
    made = []
    with house_style():
        for name, caption, draw in drawings:
            figure = draw(runs)
            png, svg = BytesIO(), BytesIO()
            figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
            figure.set_layout_engine("none")  # the layout is found; finding it again takes as long as drawing
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            made.append(Picture(name, caption, png.getvalue(), svg.getvalue().decode()))
    return made


def _attainment(runs: Sequence[PolicyRun]) -> "Figure":
    styles = line_styles([run.name for run in runs])
    classes = [slo.name for slo in runs[0].slo_classes]
    figure = new_figure(3.6)
    axes = figure.subplots()
    breadth = 0.82 / len(runs)
    for nth, run in enumerate(runs):
        attained = run.summary["slo_attainment"]
        shares = [attained["overall"], *(attained["by_class"][name] for name in classes)]
        places = np.arange(len(shares)) + (nth - (len(runs) - 1) / 2) * breadth
        heights = [0.0 if share is None else share * 100 for share in shares]
        axes.bar(places, heights, breadth * 0.92, color=styles[run.name].colour, label=run.name)
        for place, height, share in zip(places, heights, shares, strict=True):
            axes.annotate(
                "no data" if share is None else f"{height:.0f}",
                (place, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8 if len(runs) <= 6 else 6,
                fontweight="bold" if run.name == "qlm" else "normal",
            )
    labels = ["all requests", *(f"{slo.name}\n{targets(slo)}" for slo in runs[0].slo_classes)]
    axes.set_xticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("SLO met (% of requests)")
    axes.grid(visible=False, axis="x")
    _legend(axes, "How often each policy met the SLO")
    return figure


def _ttft(runs: Sequence[PolicyRun]) -> "Figure":
    styles = line_styles([run.name for run in runs])
    classes = runs[0].slo_classes
    columns = min(3, len(classes))
    rows = -(-len(classes) // columns)
    figure = new_figure(0.5 + 2.9 * rows, "Time to first token against the SLO")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, slo in zip(grid, classes, strict=False):
        for run in runs:
            inside = run.requests.of_class(slo.name)
            ttft_s = run.requests.ttft_s[inside]
            ttft_s = ttft_s[~np.isnan(ttft_s)]
            if len(ttft_s) == 0:
                continue
            levels = np.linspace(0, 1, min(len(ttft_s), 500))
            reached = len(ttft_s) / int(inside.sum())
            style = styles[run.name]
            axes.step(
                np.maximum(np.quantile(ttft_s, levels), 1e-3),
                levels * reached * 100,
                where="post",
                color=style.colour,
                linestyle=style.dash,
                linewidth=style.width,
                zorder=style.layer,
                label=run.name,
            )
        if slo.ttft_s is not None:
            axes.axvline(slo.ttft_s, color=INK, linewidth=1.1, linestyle=":")
            axes.annotate(
                targets(slo),
                (slo.ttft_s, 2),
                (-4, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="bottom",
                fontsize=8,
                color=INK,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
                zorder=6,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(0, 102)
        axes.set_title(slo.name, fontweight="normal")
        axes.set_xlabel("TTFT (s)")
    for axes in list(grid)[len(classes) :]:
        axes.set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("requests of the class (%)")
    _figure_legend(figure, runs)
    return figure


def _load(runs: Sequence[PolicyRun]) -> "Figure":
    styles = line_styles([run.name for run in runs])
    figure = new_figure(6.6)
    waiting, busy, kv = figure.subplots(3, 1, sharex=True, height_ratios=(1.5, 1, 1))
    for run in runs:
        style = styles[run.name]
        look = {
            "color": style.colour,
            "linestyle": style.dash,
            "linewidth": style.width,
            "zorder": style.layer,
        }
        waiting.plot(run.load.time_s, run.load.waiting.sum(axis=1), label=run.name, **look)
        end_s = max(
            (float(engine.time_s[-1]) for engine in run.engines.values() if len(engine.time_s)), default=0
        )
        if end_s > 0:
            edges_s = np.linspace(0, end_s, _UTILIZATION_BINS + 1)
            middles_s = (edges_s[1:] + edges_s[:-1]) / 2
            engines = list(run.engines.values())
            busy.plot(middles_s, 100 * np.mean([e.busy_share(edges_s) for e in engines], axis=0), **look)
            used = [np.interp(middles_s, e.time_s, e.kv_utilization) for e in engines if len(e.time_s)]
            kv.plot(middles_s, 100 * np.mean(used, axis=0), **look)
    last_arrival_s = max(
        (float(run.requests.arrival_s.max()) for run in runs if len(run.requests)), default=0.0
    )
    for axes in (waiting, busy, kv):
        axes.axvline(last_arrival_s, color=FAINT_INK, linewidth=1, linestyle=":")
    waiting.set_ylabel("requests")
    waiting.set_ylim(bottom=0)
    busy.set_title("GPUs executing, mean of instances")
    kv.set_title("KV cache in use, mean of instances")
    for axes in (busy, kv):
        axes.set_ylabel("%")
        axes.set_ylim(0, 104)
    set_time_axis(kv, runs)
    _legend(waiting, "Requests waiting")
    return figure


def _queue_by_class(runs: Sequence[PolicyRun]) -> "Figure":
    from matplotlib import colormaps

    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    names = [slo.name for slo in runs[0].slo_classes]
    shades = [colormaps["cividis"](0.25 + 0.7 * nth / max(1, len(names) - 1)) for nth in range(len(names))]
    figure = new_figure(0.6 + 2.1 * rows, "Who waits, by SLO class")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, run in zip(grid, runs, strict=False):
        load = run.load
        layers = [
            load.waiting[:, load.class_names.index(name)]
            if name in load.class_names
            else np.zeros(len(load.time_s), dtype=np.int64)
            for name in names
        ]
        axes.stackplot(load.time_s, layers, labels=names, colors=shades, linewidth=0)
        axes.set_title(
            f"{run.name}: SLO met {percent(run.summary['slo_attainment']['overall'])}", fontweight="normal"
        )
        axes.set_ylim(bottom=0)
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    for axes in grid[: len(runs)][-columns:]:
        axes.tick_params(labelbottom=True)
    set_time_axis(grid[len(runs) - 1], runs)
    for axes in grid[::columns]:
        axes.set_ylabel("requests waiting")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def _legend(axes: "Axes", title: str) -> None:
    """Above the plot, beside nothing, in as few rows as hold it; the title above it."""
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=_LEGEND_COLUMNS,
        borderaxespad=0.2,
        handlelength=2.4,
    )
    rows = -(-len(legend.get_texts()) // _LEGEND_COLUMNS)
    axes.set_title(title, pad=8 + 17 * rows)


def _figure_legend(figure: "Figure", runs: Sequence[PolicyRun]) -> None:
    from matplotlib.lines import Line2D

    styles = line_styles([run.name for run in runs])
    handles = [
        Line2D([], [], color=style.colour, linestyle=style.dash, linewidth=style.width, label=name)
        for name, style in styles.items()
    ]
    beside_title = len(handles) <= 4
    figure.legend(
        handles=handles,
        loc="outside upper right" if beside_title else "outside lower left",
        ncols=_LEGEND_COLUMNS,
        handlelength=2.4,
    )
