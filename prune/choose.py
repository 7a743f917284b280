"""The choice: which gammas go, under one threshold for the whole network and every constraint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from torch import Tensor

from netslim.prune.channels import ChannelMap, Coupling
from netslim.prune.plan import Kept, Plan
from netslim.prune.slices import Flags, realise
from netslim.prune.units import Reduce, Rooms, Units, units_of


def make_plan(
    gammas: Mapping[str, Tensor],
    channels: ChannelMap,
    *,
    ratio: float,
    coupling: Coupling = "group",
    reduce: Reduce = "max",
    min_channels: int = 1,
    min_share: float = 0.0,
    max_ratio: float | None = None,
    round_to: int | None = None,
    exclude: Sequence[str] = (),
) -> Plan:
    """Choose the channels of smallest |gamma| over the whole network (Liu et al. 2017, section 3, arXiv 1708.06519).

    floor(ratio * N) of the N removable gammas are to go: the smallest, ties by order of layers, then by channel. With
    coupling "select" every gamma counts by itself. With "group" classes are taken whole, in the order of the `reduce`
    of their |gamma|; one that would exceed the number is passed over for the next that fits, so fewer may go, by less
    than the size of the smallest class left. Every layer keeps max(min_channels, ceil(min_share * width), width -
    floor(max_ratio * width)) channels or all it has; where that holds a channel, the next smallest goes instead. Ratios
    are exact decimals: 0.29 of 100 is 29.

    Args:
        gammas: per BatchNorm with removable gammas (`channels.named_gammas(model, coupling)`), (width,), any device.
        round_to: afterwards each cut layer gets back its largest channels up to a multiple of this, or whole.
        exclude: patterns of BatchNorm names (`*` as in file names) that lose nothing and do not count.

    Raises: ValueError if a number is out of its range, gammas are missing, misshapen or not finite, or if the floors
    make the ratio unreachable.
    """
    _check_settings(ratio, min_channels, min_share, max_ratio, round_to)
    units = units_of(gammas, channels, coupling, reduce, exclude)
    floors = np.array([_floor(layer.width, min_channels, min_share, max_ratio) for layer in channels.layers])
    num_candidates = int(units.sizes.sum())
    num_asked = math.floor(_exact(ratio) * num_candidates)
    rooms = Rooms(channels, units, floors, coupling)
    taken, spared = _take(units, rooms, num_asked)
    removed = int(units.sizes[taken].sum())
    if removed < num_asked and not _stopped_by_size(units, rooms, taken, num_asked - removed):
        raise ValueError(
            f"ratio {ratio} asks for {num_asked} of {num_candidates} channels, but the floors "
            f"(min_channels {min_channels}, min_share {min_share}, max_ratio {max_ratio}) let only {removed} go; "
            f"the largest ratio possible is {removed / num_candidates:.6g}"
        )
    if round_to:
        _round_up(units, taken, channels, round_to)
    return _plan(channels, units, taken, spared, ratio=ratio, coupling=coupling, num_asked=num_asked)


def _take(units: Units, rooms: Rooms, asked: int) -> tuple[Flags, Counter[int]]:
    """Take units in order while they fit: flags (units,), and per layer the gammas that only a floor spares."""
    sizes = units.sizes.tolist()
    taken, left = np.zeros(len(sizes), bool), asked
    for unit in units.order.tolist():
        if left <= 0:
            break
        if sizes[unit] <= left:
            taken[unit] = True
            left -= sizes[unit]
    if (rooms.left(taken) >= 0).all():
        return taken, Counter()
    return _take_carefully(units, rooms, asked)


def _take_carefully(units: Units, rooms: Rooms, asked: int) -> tuple[Flags, Counter[int]]:
    sizes, needs = units.sizes.tolist(), rooms.needs
    taken, left = np.zeros(len(sizes), bool), asked
    room = rooms.left(taken).tolist()
    refused = np.zeros(len(sizes), bool)
    for unit in units.order.tolist():
        if left <= 0:
            break
        if any(room[key] < need for key, need in needs[unit].items()):
            refused[unit] = True
        elif sizes[unit] <= left:
            taken[unit] = True
            left -= sizes[unit]
            for key, need in needs[unit].items():
                room[key] -= need
    held = units.layers[(units.owners >= 0) & refused[units.owners]]
    return taken, Counter(held.tolist())


def _stopped_by_size(units: Units, rooms: Rooms, taken: Flags, short: int) -> bool:
    """Tell whether a class stays only because it is larger than what was still to go."""
    room = rooms.left(taken).tolist()
    return any(
        units.sizes[unit] > short and all(room[key] >= need for key, need in rooms.needs[unit].items())
        for unit in np.flatnonzero(~taken).tolist()
    )


def _round_up(units: Units, taken: Flags, channels: ChannelMap, round_to: int) -> None:
    """Give units back, the largest first, until every cut layer has a multiple of channels, or all it had."""
    widths = np.array([layer.width for layer in channels.layers])
    mine = np.flatnonzero(units.owners >= 0)
    rank = np.empty(len(units.order), np.int64)
    rank[units.order] = np.arange(len(units.order))
    while True:
        gone = mine[taken[units.owners[mine]]]
        lost = np.bincount(units.layers[gone], minlength=len(widths))
        odd = np.flatnonzero((lost > 0) & ((widths - lost) % round_to > 0))
        if not len(odd):
            return
        there = units.owners[gone[units.layers[gone] == odd[0]]]
        taken[there[rank[there].argmax()]] = False


def _plan(
    channels: ChannelMap,
    units: Units,
    taken: Flags,
    spared: Counter[int],
    *,
    ratio: float,
    coupling: Coupling,
    num_asked: int,
) -> Plan:
    gone = (units.owners >= 0) & taken[units.owners] if len(taken) else np.zeros(len(units.owners), bool)
    ends = np.cumsum([layer.width for layer in channels.layers])[:-1]
    flags = {layer.name: part for layer, part in zip(channels.layers, np.split(gone, ends), strict=True)}
    slices, selections = realise(channels, flags)
    return Plan(
        ratio=float(ratio),
        coupling=coupling,
        threshold=float(units.scores[taken].max()) if taken.any() else None,
        num_channels=int(units.sizes.sum()),
        num_asked=num_asked,
        num_removed=int(gone.sum()),
        layers=tuple(
            Kept(
                name=layer.name,
                width=layer.width,
                kept=tuple(np.flatnonzero(~flags[layer.name]).tolist()),
                spared=spared[order],
            )
            for order, layer in enumerate(channels.layers)
        ),
        slices=slices,
        selections=selections,
    )


def _check_settings(
    ratio: float, min_channels: int, min_share: float, max_ratio: float | None, round_to: int | None
) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is not in [0, 1): it is the share of all prunable channels that go")
    if min_channels < 1:
        raise ValueError(f"min_channels {min_channels} is below 1: no layer can be empty")
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share {min_share} is not in [0, 1]: it is the share of a layer's width that stays")
    if max_ratio is not None and not 0 <= max_ratio <= 1:
        raise ValueError(f"max_ratio {max_ratio} is not in [0, 1]: it is the share of a layer's width that may go")
    if round_to is not None and round_to < 1:
        raise ValueError(f"round_to {round_to} is below 1: kept channels are a multiple of it")


def _floor(width: int, min_channels: int, min_share: float, max_ratio: float | None) -> int:
    most = width if max_ratio is None else math.floor(_exact(max_ratio) * width)
    return max(min_channels, math.ceil(_exact(min_share) * width), width - most)


def _exact(share: float) -> Fraction:
    """Read a share as the decimal that was written: the binary 0.29 is a little less than 29/100."""
    return Fraction(repr(float(share)))
