"""What pruning does to a network, as pictures for its W&B run; drawn only where there is one."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

_LEFT, _GONE, _LINE = "#2364aa", "#cccccc", "#b0413e"


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
    return _png(figure)


def draw_density(gammas: Tensor, threshold: float | None) -> bytes:
    """Draw how |gamma|, (channels,), is spread over all channels that can go, and the threshold if it is of |gamma|."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(gammas.numpy(), bins=100, density=True, color=_LEFT)
    axes.set(xlabel="|gamma|", ylabel="density", title="Where the sparse network's scales lie", yscale="log")
    if threshold is not None:
        axes.axvline(threshold, color=_LINE, linestyle="--", label=f"threshold {threshold:.3g}")
        axes.legend()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
