"""Pictures for those who would rather look than read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_CUT, _REPAIRED, _SPARSE = "#b0413e", "#2364aa", "#444444"


def draw_inspection(found: dict[str, Any], best: float | None, path: Path) -> None:
    """Draw what ``inspect`` found: accuracy by ratio, cut and repaired, and the |gamma| of every layer, as a PNG."""
    figure = Figure(figsize=(12, max(4.5, 1.5 + 0.22 * len(found["layers"]))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_ratios(left, found, best)
    _draw_gammas(figure, right, found["layers"], found["threshold"], found["ratio"])
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
            label = f"largest within the loss: {row['macs'] / found['macs']:.0%} of the MACs"
            axes.axvline(best, color=_REPAIRED, linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="ratio of channels removed", ylabel="accuracy, %", title="Accuracy right after pruning")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _draw_gammas(figure: Figure, axes: Axes, layers: Sequence[dict[str, Any]], threshold: float, ratio: float) -> None:
    shares = np.array([np.array(row["histogram"]) / row["channels"] for row in layers])
    top = max(row["largest"] for row in layers)
    image = axes.imshow(
        100 * shares, aspect="auto", cmap="viridis", extent=(0, top, len(layers) - 0.5, -0.5), interpolation="nearest"
    )
    axes.axvline(threshold, color="white", linestyle="--", label=f"threshold of ratio {ratio:g}")
    axes.set_yticks(range(len(layers)), [row["layer"] for row in layers], fontsize=8)
    axes.set(xlabel="|gamma|", title="Where the scales of each BatchNorm lie")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), facecolor="black", labelcolor="white")
    figure.colorbar(image, ax=axes, label="share of the layer's channels, %")
