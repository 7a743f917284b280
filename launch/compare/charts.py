"""A chart of a comparison's page: how it looks, where its values are, and how it becomes a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK, MUTED, LINE, PAPER, BAR = "#1b2027", "#5b6572", "#d8dce1", "#fdfdfc", "#c3cad3"
SERIES = ("#55606e", "#0072b2", "#d55e00", "#00855f", "#a64d8f", "#97700b", "#2f8fc4", "#8a3b1e")
"""Of the lambdas in their order, told apart also by the colour-blind (after Okabe and Ito), and by markers too."""
MARKERS = ("o", "s", "^", "D", "v")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Of the ratios in their order."""
DASH_NAMES = ("solid", "dashed", "dotted", "dash-dotted")
SIZE = (5.0, 3.6)  # inches of 72 units: as wide as a phone shows it at its text's own size
STYLE: Any = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "path.simplify": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "netslim",
    "savefig.facecolor": "none",
}
_WIDE = 0.15  # of a spread of accuracies that a straight axis would not resolve near its top
_TICKS = (10, 50, 70, 80, 90, 95, 98, 99, 100)
_STEPS = ((0.7, (1, 2, 3, 5, 7)), (1.3, (1, 2, 5)), (2.6, (1, 3)), (float("inf"), (1,)))
"""Below so many decades, where the ticks of each decade are."""
MOST_IN_LEGEND = 24
Mark = tuple[float, float, str]


@dataclass
class Chart:
    """A figure, and the values that a reader can ask for: where they are drawn, and what they say."""

    name: str
    title: str
    note: str
    figure: Figure
    axes: Axes
    marks: list[tuple[str, list[Mark]]] = field(default_factory=list)
    """A series' label, and its points: x and y as the axes have them, and the text."""

    def settle(self) -> None:
        """Fix where everything is, so that `points` and `svg` agree."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def points(self) -> list[tuple[str, list[Mark]]]:
        """The marks in the units of the SVG, from its upper left corner."""
        return [(label, [self._place(mark) for mark in marks]) for label, marks in self.marks]

    def _place(self, mark: Mark) -> Mark:
        x, y = self.axes.transData.transform(mark[:2])
        return round(float(x), 1), round(float(self.figure.bbox.height - y), 1), mark[2]

    def svg(self) -> str:
        """The figure as SVG, with text as text; but for its metadata the same bytes each time."""
        file = io.StringIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(file, format="svg")
        return file.getvalue()

    def save(self, directory: Path, weights: Sequence[float]) -> None:
        """Write the figure to stand alone, with its title and legend: NAME.svg and NAME.png."""
        with matplotlib.rc_context(STYLE):
            self.figure.set_layout_engine("constrained")
            self.axes.set_title(self.title, fontsize=11)
            for index, weight in enumerate(weights if len(weights) <= MOST_IN_LEGEND else ()):
                marker, label = MARKERS[index % len(MARKERS)], f"lambda {weight:g}"
                self.axes.plot([], [], color=color_of(index), marker=marker, linestyle="none", label=label)
            if len(weights) > MOST_IN_LEGEND:
                self.axes.plot([], [], linestyle="none", label=f"{len(weights)} lambdas: colours as on the page")
            self.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, columnspacing=1)
            for name, metadata in ((f"{self.name}.svg", {"Date": None}), (f"{self.name}.png", {})):
                self.figure.savefig(directory / name, dpi=150, facecolor="white", metadata=metadata)


def color_of(index: int) -> str:
    return SERIES[index % len(SERIES)]


def label_accuracy(axes: Axes, low: float, high: float) -> None:
    """Label an axis of accuracies in percent, and stretch it towards 100 where the best would lie together else."""
    if high - low < 100 * _WIDE:
        axes.margins(y=0.12)
        axes.set_ylabel("accuracy, %")
        return

    def forward(value: np.ndarray) -> np.ndarray:
        return -np.log10(np.maximum(101.5 - np.asarray(value), 1e-3))

    axes.set_yscale("function", functions=(forward, lambda value: 101.5 - 10 ** -np.asarray(value)))
    axes.set_ylim(max(0.0, low - 4), 100.3)
    axes.set_yticks([tick for tick in _TICKS if tick >= low - 4])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("accuracy, % (stretched towards 100)")


def scale_log(axes: Axes, name: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with ticks that are labelled however narrow it is."""
    axis, set_margin, limits = {
        "x": (axes.xaxis, axes.set_xmargin, axes.get_xlim),
        "y": (axes.yaxis, axes.set_ymargin, axes.get_ylim),
    }[name]
    axes.set(**{f"{name}scale": "log"})
    set_margin(0.08)
    low, high = limits()
    decades = float(np.log10(high / low))
    steps = next(steps for most, steps in _STEPS if decades < most)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A count as axes show it: 300k, 1M."""
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
