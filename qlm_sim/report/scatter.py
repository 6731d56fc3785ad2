"""Simulated against measured times, one point per request. matplotlib is imported only to draw."""

from collections.abc import Mapping
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from qlm_sim.report.style import FAINT_INK, house_style, line_styles, new_figure

TITLES = {"ttft_s": "time to first token", "tpot_s": "time per output token", "e2e_s": "end to end"}


def scatter_png(
    real: Mapping[str, NDArray[np.float64]], simulated: Mapping[str, NDArray[np.float64]], title: str
) -> bytes:
    """One panel per metric, both axes in seconds and logarithmic, with lines at equality and 10 % off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = [name for name in TITLES if name in real and name in simulated]
    with house_style():
        figure = new_figure(3.6, title)
        for place, name in enumerate(names, 1):
            axes = figure.add_subplot(1, len(names), place)
            x, y = real[name], simulated[name]
            shown = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
            x, y = x[shown], y[shown]
            if len(x) == 0:
                continue
            low, high = 0.9 * min(x.min(), y.min()), 1.1 * max(x.max(), y.max())
            span = np.array([low, high])
            axes.plot(span, span, color=FAINT_INK, linewidth=1)
            for factor in (0.9, 1.1):
                axes.plot(span, factor * span, color=FAINT_INK, linewidth=0.7, linestyle=(0, (4, 3)))
            axes.scatter(x, y, s=9, alpha=0.5, color=line_styles(["qlm"])["qlm"].colour, linewidths=0)
            axes.set(xscale="log", yscale="log", xlim=span, ylim=span, title=TITLES[name])
            axes.set(xlabel="measured, s", ylabel="simulated, s" if place == 1 else "")
            for axis in (axes.xaxis, axes.yaxis):  # less than a decade would be labelled all over
                axis.set_minor_formatter(NullFormatter())
                axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
            axes.set_box_aspect(1)
        png = BytesIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return png.getvalue()
