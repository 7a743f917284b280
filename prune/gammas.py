"""A network's scales to look at: |gamma| of every BatchNorm in figures, as a table, and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from netslim.prune.choose import Rules, Units, by_layer, check_ratio, magnitudes_of, units_of
from netslim.prune.map import ChannelMap, Coupling, Ints, few, map_channels
from netslim.prune.record import NORMALISING, Example, weight_of
from netslim.prune.tables import Row, gammas_as_html, gammas_as_text, threshold_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 16
"""Of a row's histogram."""


@dataclass(frozen=True, eq=False, repr=False)
class Gammas(Sequence[Row]):
    """|gamma| of a network: prints as a table, also in a notebook, and is a sequence of rows, one for each BatchNorm.

    A row is a dictionary of plain values: ``layer``, its name; ``channels``; ``removable``, how many of them can go;
    ``num_below``, how many of these the threshold of the ratio takes, before any floor holds some, and
    ``below_threshold``, that as a share of its channels, where 1 is a layer that the threshold would empty;
    ``smallest``, ``median`` and ``largest`` |gamma|; ``below_1e-2`` and ``below_1e-3``, the shares of its channels near
    zero; ``histogram``, counts in 16 equal bins from 0 to the largest |gamma| of all. None is what was not asked for.
    """

    magnitudes: Mapping[str, NDArray[np.float64]]
    """|gamma| of each BatchNorm, (width,), in the order of execution, or, without a map, in that of its definition."""
    owners: Mapping[str, Ints]
    """For each of these the unit that goes or stays as a whole with it, (width,); -1 = it stays."""
    units: Units
    ratio: float | None
    """Share of the channels that can go, for whose threshold the figures are."""
    is_mapped: bool
    """Whether it is known which channels can go; else all count as if they could."""
    note: str = ""
    """What was left out."""

    def at(self, ratio: float | None) -> Gammas:
        """Give the same for another ratio in [0, 1); ValueError for what is none."""
        if ratio is not None:
            check_ratio(ratio)
        return replace(self, ratio=ratio)

    @cached_property
    def threshold(self) -> float | None:
        """The largest |gamma| that goes at the ratio, over all layers, of coupled channels that of the largest of them.

        It is that of the plan which `slim` makes by default, unless a layer's floor holds some channels there. None
        without a ratio, or where it takes nothing.
        """
        return float(self.units.scores[self._taken].max()) if self._taken.any() else None

    def plot(self, path: str | os.PathLike[str] | None = None, ratio: float | None = None) -> Figure:
        """Draw how |gamma| is spread over all channels that can go, and in each layer, with the threshold of a ratio.

        It needs no display, and leaves matplotlib's pyplot alone; a notebook shows the figure that comes back.

        Args: path to write it to as well, as its ending says (.png, .svg, .pdf); ratio, by default the table's own.
        """
        from netslim.prune.drawing import draw_gammas  # here: matplotlib is imported only to draw

        seen = self if ratio is None else self.at(ratio)
        free = [self.magnitudes[name][owners >= 0] for name, owners in self.owners.items()]
        figure = draw_gammas(seen, np.concatenate(free), seen.threshold, seen.ratio)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __len__(self) -> int:
        return len(self.magnitudes)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return "\n".join([gammas_as_text(self), *self._said])

    def _repr_html_(self) -> str:
        return gammas_as_html(self, self._said)

    @cached_property
    def _taken(self) -> NDArray[np.bool_]:
        """Flag the units that go, (units,)."""
        return self.units.smallest(0 if self.ratio is None else self.units.asked(self.ratio))

    @cached_property
    def _rows(self) -> list[Row]:
        top = max(float(each.max()) for each in self.magnitudes.values()) or 1.0
        return [self._row(name, top) for name in self.magnitudes]

    def _row(self, name: str, top: float) -> Row:
        magnitudes, owners = self.magnitudes[name], self.owners[name]
        free = owners[owners >= 0]
        num_below = None if self.ratio is None else int(self._taken[free].sum())
        return {
            "layer": name,
            "channels": len(magnitudes),
            "removable": len(free) if self.is_mapped else None,
            "num_below": num_below,
            "below_threshold": None if num_below is None else num_below / len(magnitudes),
            "smallest": float(magnitudes.min()),
            "median": float(np.median(magnitudes)),
            "largest": float(magnitudes.max()),
            "below_1e-2": float((magnitudes < 1e-2).mean()),
            "below_1e-3": float((magnitudes < 1e-3).mean()),
            "histogram": np.histogram(magnitudes, bins=BINS, range=(0, top))[0].tolist(),
        }

    @property
    def _said(self) -> list[str]:
        """What stands below the table."""
        width, count = sum(map(len, self.magnitudes.values())), self.units.count
        whether = f"all {width} channels, whether or not they can go: give an example to know"
        lines = [f"{count} of {width} channels can go" if self.is_mapped else whether]
        if self.ratio is not None:
            lines.append(threshold_line(self, self.ratio, self.threshold))
        return [*lines, *([self.note] if self.note else [])]


def gammas(
    model: nn.Module,
    example: Example | ChannelMap | None = None,
    *,
    ratio: float | None = None,
    coupling: Coupling = "group",
) -> Gammas:
    """Look at the |gamma| of a network's BatchNorms: which channels can go, and where the threshold of a ratio lies.

        gammas(model, images[:2], ratio=0.5).plot("gammas.png")

    Args: example, as the network is called (see `slim`), or its channel map, if that is at hand: then the BatchNorms
    are those of which a channel can go under the coupling. Without one they are all modules of that type, whether or
    not their channels can go. Ratio in [0, 1): for how many channels go at it.
    Raises: ValueError where no BatchNorm has a gamma, or one that is not finite, for a ratio out of its range, and as
    `map_channels` does.
    """
    if ratio is not None:
        check_ratio(ratio)
    if example is None:
        return _unmapped(model, ratio)
    channels = example if isinstance(example, ChannelMap) else map_channels(model, example, coupling)
    found = channels.named_gammas(model, coupling)
    if not found:
        raise ValueError(f"no channel can go under coupling {coupling}: {channels.kept_by(coupling)}")
    units = units_of(found, channels, Rules(coupling=coupling))
    owners = by_layer(units.owners, channels)
    left = [layer.name for layer in channels.layers if layer.name not in found]
    return Gammas(
        magnitudes={name: magnitudes_of(name, gamma) for name, gamma in found.items()},
        owners={name: owners[name] for name in found},
        units=units,
        ratio=ratio,
        is_mapped=True,
        note=f"without BatchNorms of which no channel can go: {_quoted(left)}" if left else "",
    )


def _unmapped(model: nn.Module, ratio: float | None) -> Gammas:
    """Look at every BatchNorm of a type, with each channel by itself."""
    found, without = _by_type(model)
    magnitudes = {name: magnitudes_of(name, gamma) for name, gamma in found.items()}
    widths = [len(each) for each in magnitudes.values()]
    every = np.concatenate(list(magnitudes.values()))
    units = Units(
        layers=np.repeat(np.arange(len(widths)), widths),
        indices=np.concatenate([np.arange(width) for width in widths]),
        owners=np.arange(len(every)),
        scores=every,
        order=np.argsort(every, kind="stable"),
    )
    owners = dict(zip(magnitudes, np.split(units.owners, np.cumsum(widths)[:-1]), strict=True))
    note = f"without BatchNorms that have no gamma (affine=False): {_quoted(without)}" if without else ""
    return Gammas(magnitudes, owners, units, ratio, is_mapped=False, note=note)


def _by_type(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Find the gamma of each BatchNorm, and the BatchNorms that have none; ValueError if there is no gamma."""
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMALISING)]
    if not norms:
        raise ValueError(
            "the network has no BatchNorm layer, so there is no gamma to look at; use one with BatchNorm, or give an "
            "example if its BatchNorm is called as a function"
        )
    found = {name: gamma for name in norms if (gamma := weight_of(model, name)) is not None}
    without = [name for name in norms if name not in found]
    if not found:
        raise ValueError(f"no BatchNorm of the network has a gamma (affine=False): {_quoted(without)}; use affine=True")
    return found, without


def _quoted(names: Sequence[str]) -> str:
    return few([f"'{name}'" for name in names])
