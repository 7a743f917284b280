"""Pictures for those who would rather look than read; this module, and matplotlib, is imported only to draw one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from netslim.prune.drawing import BELOW, draw_distribution, draw_layers, height_of, png

_CUT, _REPAIRED, _SPARSE = "#b0413e", "#2364aa", "#444444"
_LEFT, _GONE = "#2364aa", "#cccccc"


def draw_channels(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the channels of each layer, before the cut and after, as a PNG; the rows are those of `channel_rows`."""
    figure = Figure(figsize=(8, max(3.0, 1.0 + 0.2 * len(rows))), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["channels"] for row in rows], color=_GONE, label="before the cut")
    axes.barh(places, [row["kept"] for row in rows], color=_LEFT, label="kept")
    axes.set_yticks(places, [row["layer"] for row in rows], fontsize=7)
    axes.invert_yaxis()  # the first layer at the top
    axes.set(xlabel="channels", title="What the cut leaves of each BatchNorm")
    axes.legend()
    return png(figure)


def draw_density(gammas: Tensor, threshold: float | None) -> bytes:
    """Draw how |gamma|, (channels,), is spread over all channels that can go, and the threshold if it is of |gamma|."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    draw_distribution(figure.subplots(), gammas.numpy(), threshold)
    return png(figure)


def draw_inspection(found: dict[str, Any], best: float | None, path: Path) -> None:
    """Draw what ``inspect`` found: accuracy by ratio, cut and repaired, and the |gamma| of every layer, as a PNG."""
    figure = Figure(figsize=(12, height_of(len(found["layers"]))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_ratios(left, found, best)
    draw_layers(right, found["layers"], found["threshold"], found["ratio"])
    figure.savefig(path, dpi=150)


def _draw_ratios(axes: Axes, found: dict[str, Any], best: float | None) -> None:
    rows = [row for row in found["ratios"] if "refused" not in row]
    ratios = [0.0, *(row["ratio"] for row in rows)]
    for key, color in (("cut", _CUT), ("repaired", _REPAIRED)):
        values = [100 * value for value in (found["accuracy"], *(row[key] for row in rows))]
        axes.plot(ratios, values, color=color, marker="o", label=f"{key}, no training step")
    axes.axhline(100 * found["accuracy"], color=_SPARSE, linestyle=":", label="sparse model")
    for row in rows:
        if best is not None and row["ratio"] == best:
            label = f"{best:g}, the largest within the loss: {row['macs'] / found['macs']:.0%} of the MACs"
            axes.axvline(best, color=_REPAIRED, linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="ratio of channels removed", ylabel="accuracy, %", title="Accuracy right after pruning")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(**BELOW)  # in one column: two are wider than the picture
