"""Pictures of |gamma|; this module, and matplotlib, is imported only to draw one.

Nothing here knows of pyplot: no display is needed, no backend chosen, and no figure stays open.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

_BARS, _LINE = "#2364aa", "#b0413e"
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 3.6}
"""A legend below the label of an axis, however high the picture: the pad is in heights of the font."""


class Picture(Figure):
    """A figure that a notebook shows, which it does by itself only for those of pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, dpi: int = 100) -> bytes:
    """Give a figure as the content of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def height_of(num_layers: int) -> float:
    """Inches in which the names of so many layers can be read one below the other."""
    return max(4.5, 1.5 + 0.22 * num_layers)


def draw_gammas(
    rows: Sequence[Mapping[str, Any]], magnitudes: NDArray[np.float64], threshold: float | None, ratio: float | None
) -> Picture:
    """Draw |gamma|, (channels,), of what can go, and that of each layer as the rows of `Gammas` have it."""
    figure = Picture(figsize=(12, height_of(len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_distribution(left, magnitudes, threshold, ratio)
    draw_layers(right, rows, threshold, ratio)
    return figure


def draw_distribution(
    axes: Axes, magnitudes: NDArray[np.float64], threshold: float | None, ratio: float | None = None
) -> None:
    """Draw how |gamma|, (channels,), is spread over all channels that can go, and the threshold if there is one."""
    axes.hist(magnitudes, bins=50, range=(0, magnitudes.max() or 1), color=_BARS)
    axes.set(xlabel="|gamma|", ylabel="channels", title="Where the scales of all layers lie", yscale="log")
    if threshold is not None:
        axes.axvline(threshold, color=_LINE, linestyle="--", label=_label(threshold, ratio))
        axes.legend()


def draw_layers(
    axes: Axes, rows: Sequence[Mapping[str, Any]], threshold: float | None, ratio: float | None = None
) -> None:
    """Draw the histogram of each layer's |gamma| as a line of colours, and the threshold if there is one."""
    shares = np.array([np.array(row["histogram"]) / row["channels"] for row in rows])
    top = max(row["largest"] for row in rows) or 1.0
    image = axes.imshow(
        100 * shares, aspect="auto", cmap="viridis", extent=(0, top, len(rows) - 0.5, -0.5), interpolation="nearest"
    )
    axes.set_yticks(range(len(rows)), [row["layer"] for row in rows], fontsize=8)
    axes.set(xlabel="|gamma|", title="Where the scales of each BatchNorm lie")
    if threshold is not None:
        axes.axvline(threshold, color="white", linestyle="--", label=_label(threshold, ratio))
        axes.legend(**BELOW, facecolor="black", labelcolor="white")
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are drawn in one"
    figure.colorbar(image, ax=axes, label="share of the layer's channels, %")


def _label(threshold: float, ratio: float | None) -> str:
    return f"threshold {threshold:.3g}" + (f" of ratio {ratio:g}" if ratio is not None else "")
