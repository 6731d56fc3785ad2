"""How figures look: colours that hold for the colour-blind, and the same colour for a policy everywhere.

Knows nothing of what is drawn. matplotlib is imported only to draw.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_IN = 9.0

INK, FAINT_INK, GRID, PAPER = "#1f2430", "#667085", "#d9dde4", "#ffffff"
DARK = {INK: "#e8eaee", FAINT_INK: "#9aa4b2", GRID: "#363c47", PAPER: "#171a20", "#0b62a8": "#4aa3ea"}
"""What each colour becomes on a dark page."""

_RC: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT_INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "qlm",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT_INK,
    "ytick.color": FAINT_INK,
}

MODEL_COLOURS = (
    "#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#44bb99", "#bbcc33", "#99ddff", "#aaaa00",
)  # fmt: skip
"""Paul Tol's "light" scheme: fills that stay apart under colour blindness."""


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How one policy is drawn in every figure."""

    colour: str
    dash: Any
    """As matplotlib's ``linestyle`` takes it."""
    width: float
    layer: int


_KNOWN = {
    "qlm": LineStyle("#0b62a8", "-", 2.6, 5),
    "vllm": LineStyle("#8b929e", "-", 1.5, 3),
    "edf": LineStyle("#e69f00", (0, (5, 1.6)), 1.5, 3),
    "shepherd": LineStyle("#cc79a7", (0, (4, 1.4, 1, 1.4)), 1.5, 3),
    "clairvoyant": LineStyle("#009e73", (0, (1, 1.2)), 1.8, 4),
}
_FURTHER = (
    LineStyle("#d55e00", (0, (3, 1)), 1.5, 3),
    LineStyle("#56b4e9", "-", 1.5, 3),
    LineStyle("#b2a800", (0, (6, 1, 1, 1)), 1.5, 3),
    LineStyle("#7d5ba6", (0, (2, 1)), 1.5, 3),
    LineStyle("#8c6d46", (0, (1, 1)), 1.5, 3),
)


def line_styles(policies: Sequence[str]) -> dict[str, LineStyle]:
    """Okabe and Ito's colours: ``qlm`` broad and blue, known policies always alike, others in turn."""
    others = [name for name in policies if name not in _KNOWN]
    further = {name: _FURTHER[i % len(_FURTHER)] for i, name in enumerate(others)}
    return {name: _KNOWN.get(name) or further[name] for name in policies}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in this style whatever the user's own matplotlib settings are; they come back afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(height_in: float, title: str = "") -> "Figure":
    """An empty figure of the reports' width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(
            title, x=0.01, ha="left", fontsize=_RC["axes.titlesize"], fontweight="bold", color=INK
        )
    return figure
