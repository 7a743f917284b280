"""The pen of a comparison's figures: colours, marks and dashes by lambda and ratio, lines, and axes of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from matplotlib.figure import Figure

from netslim.launch.compare.charts import (
    BAR,
    DASH_NAMES,
    DASHES,
    INK,
    MARKERS,
    SIZE,
    Chart,
    color_of,
    label_accuracy,
)
from netslim.launch.compare.choice import Verdict
from netslim.launch.compare.curves import Drawn
from netslim.launch.compare.entries import Entry, Sparse


class Pen:
    """Draws what there is of one data set and network; ``order`` numbers the lambdas of the whole page."""

    def __init__(self, drawn: Drawn, order: dict[float, int], prefix: str) -> None:
        self.drawn = drawn
        self.verdict: Verdict = drawn.verdict
        self.order = order
        self.prefix = prefix

    def chart(self, name: str, title: str, note: str) -> Chart:
        figure = Figure(figsize=SIZE, dpi=72, layout="constrained")
        axes = figure.subplots()
        axes.grid(True)
        return Chart(f"{self.prefix}{name}", title, note, figure, axes)

    def color(self, weight: float | None) -> str:
        return color_of(self.order[weight or 0.0])

    def marker(self, weight: float | None) -> str:
        return MARKERS[self.order[weight or 0.0] % len(MARKERS)]

    @cached_property
    def ratios(self) -> list[float]:
        """Those of the candidates, in their order."""
        return sorted({candidate.ratio or 0.0 for candidate in self.verdict.candidates})

    def dash(self, ratio: float | None) -> Any:
        return DASHES[self.ratios.index(ratio) % len(DASHES)] if ratio in self.ratios else DASHES[0]

    def dashes_note(self) -> str:
        """Say which lines are of which ratio."""
        names = [f"{DASH_NAMES[order % len(DASHES)]}: ratio {ratio:g}" for order, ratio in enumerate(self.ratios)]
        return ", ".join(names[: len(DASHES)]) + ", and so on" * (len(names) > len(DASHES))

    def draw_line(
        self, chart: Chart, source: Sparse | Entry, points: Sequence[tuple[int, float]], *, faint: float, marker: bool
    ) -> None:
        """Draw accuracies of a run in its lambda's colour and its ratio's dashes, the choice's thick."""
        is_chosen = self.drawn.is_chosen(source)
        chart.axes.plot(
            [place for place, _ in points],
            [100 * value for _, value in points],
            color=self.color(source.weight),
            linestyle=self.dash(source.ratio) if isinstance(source, Entry) else "-",
            marker=self.marker(source.weight) if marker else "",
            markersize=4,
            linewidth=2.4 if is_chosen else 1.3,
            alpha=1 if is_chosen else faint,
            zorder=4 if is_chosen else 3,
        )

    def scale_accuracy(self, chart: Chart, accuracies: Sequence[float]) -> None:
        """Draw the baseline and what may be lost, and scale the axis of accuracies: stretched where it must be."""
        axes, reference = chart.axes, self.verdict.reference
        values = [100 * value for value in accuracies]
        if self.verdict.baseline is not None:
            values.append(100 * self.verdict.baseline.accuracy)
        if reference is not None:
            axes.axhline(100 * reference, color=INK, linestyle=(0, (5, 3)), linewidth=1, zorder=1)
            axes.axhspan(100 * (reference - self.verdict.within), 100 * reference, color=BAR, alpha=0.35, linewidth=0)
        label_accuracy(axes, min(values), max(values))
