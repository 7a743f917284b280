"""What a choice is made of: the units that go or stay as a whole, and the room that every layer has for losing them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from netslim.prune.choose.rules import Reduce, Rules, exact
from netslim.prune.choose.slices import Flags
from netslim.prune.map import CONSTANT, ChannelMap, Coupling, Ends, Ints, Layer

Ranks = NDArray[np.float64]
Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True)
class Units:
    """What goes or stays as a whole: single gammas, or classes of them."""

    layers: Ints
    """(gammas,) order of the gamma's layer."""
    indices: Ints
    """(gammas,) the gamma's channel there."""
    owners: Ints
    """(gammas,) the unit it belongs to, -1 if it stays for good."""
    scores: NDArray[np.float64]  # (units,)
    order: Ints
    """(units,) in the order in which they go."""

    @cached_property
    def sizes(self) -> Ints:
        """Gammas per unit, (units,)."""
        return np.bincount(self.owners[self.owners >= 0], minlength=len(self.scores))

    @cached_property
    def rank(self) -> Ints:
        """The place of each unit in the order, (units,)."""
        return self.order.argsort()

    @property
    def count(self) -> int:
        """The gammas that can go."""
        return int(self.sizes.sum())

    def asked(self, ratio: float) -> int:
        """The ratio in whole gammas, rounded down."""
        return math.floor(exact(ratio) * self.count)

    def smallest(self, count: int) -> Flags:
        """Flag the units, (units,), that go with so many gammas: in their order, each that fits into what is left."""
        sizes = self.sizes.tolist()
        taken = np.zeros(len(sizes), bool)
        for unit in self.order.tolist():
            if count <= 0:
                break
            if sizes[unit] <= count:
                taken[unit] = True
                count -= sizes[unit]
        return taken


def units_of(scores: Mapping[str, Tensor], channels: ChannelMap, rules: Rules) -> Units:
    """Find what can go, and score it; ValueError if scores are missing, misshapen or not finite."""
    coupling = rules.coupling
    widths = [layer.width for layer in channels.layers]
    layers = np.repeat(np.arange(len(widths)), widths)
    open_ = np.concatenate([np.asarray(layer.removable(coupling)) for layer in channels.layers])
    excluded = _excluded(channels, rules.exclude)
    keys = np.arange(len(layers))
    if coupling == "group":
        keys = np.concatenate([np.asarray(layer.classes) for layer in channels.layers])
        excluded = np.isin(keys, keys[excluded])  # a class goes whole or not at all
    free = open_ & ~excluded
    _, first, numbers = np.unique(keys[free], return_index=True, return_inverse=True)
    owners = np.full(len(layers), -1)
    owners[free] = numbers
    sizes = np.concatenate(
        [_sizes(scores, x) if any(x.removable(coupling)) else np.zeros(x.width) for x in channels.layers]
    )
    if rules.normalise == "mean":
        sums = np.bincount(layers[open_], sizes[open_], len(widths))
        means = sums / np.maximum(np.bincount(layers[open_], minlength=len(widths)), 1)
        sizes = sizes / np.where(means > 0, means, 1.0)[layers]
    reduced = _reduced(sizes[free], numbers, len(first), rules.reduce)
    if rules.scope != "network":
        reduced = _ranked(reduced, np.flatnonzero(free)[first], layers, channels, rules)
    indices = np.concatenate([np.arange(width) for width in widths])
    return Units(layers, indices, owners, reduced, np.lexsort((first, reduced)))


def by_layer(values: NDArray[Value], channels: ChannelMap) -> dict[str, NDArray[Value]]:
    """Part what is given for all gammas, (gammas,), into that of each BatchNorm, (width,)."""
    ends = np.cumsum([layer.width for layer in channels.layers])[:-1]
    return {layer.name: part for layer, part in zip(channels.layers, np.split(values, ends), strict=True)}


def _ranked(scores: NDArray[np.float64], first: Ints, layers: Ints, channels: ChannelMap, rules: Rules) -> Ranks:
    """Put in place of each unit's score its rank among those of its scope, as a share in (0, 1].

    Args: first, the first gamma of each unit; layers, the layer of each gamma.
    """
    kinds, structures = {end.name: end.kind for end in channels.modules}, channels.structures
    starts = np.cumsum([0, *(layer.width for layer in channels.layers)])
    pools: dict[object, list[int]] = {}
    for unit, gamma in enumerate(first.tolist()):
        layer = int(layers[gamma])
        shared = structures[channels.layers[layer].classes[gamma - starts[layer]]]
        alone = (channels.layers[layer].name,) if rules.coupling == "select" else ()
        key: object = (alone, shared)
        if rules.scope == "family":
            key = tuple(tuple(sorted(kinds[name] for name in names)) for names in shared)
        pools.setdefault(key, []).append(unit)
    ranks = np.zeros(len(scores))
    for members in pools.values():
        order = np.argsort(scores[members], kind="stable")
        ranks[np.asarray(members)[order]] = np.arange(1, len(members) + 1) / len(members)
    return ranks


def _excluded(channels: ChannelMap, patterns: Sequence[str]) -> Flags:
    """Flag the gammas, (gammas,), of excluded BatchNorms, and those of channels that other excluded layers make."""
    norms = {layer.name for layer in channels.layers}
    held: set[str] = set()
    made: set[int] = set()
    for pattern in patterns:
        found = [end for end in channels.modules if _matches(end, pattern)]
        if not found:
            raise ValueError(f"exclude names {pattern!r}, but no layer with weights has this name or type")
        held.update(end.name for end in found if end.name in norms)
        made.update(number for end in found if end.name not in norms for number in end.outputs)
    inputs = {end.name: end.inputs for end in channels.modules}
    return np.concatenate(
        [np.isin(inputs[x.name], list(made - {CONSTANT})) | (x.name in held) for x in channels.layers]
    )


def _matches(end: Ends, pattern: str) -> bool:
    return fnmatchcase(end.name, pattern) or end.name.startswith(f"{pattern}.") or end.kind == pattern


def _reduced(sizes: NDArray[np.float64], numbers: Ints, count: int, reduce: Reduce) -> NDArray[np.float64]:
    if reduce == "max":
        scores = np.zeros(count)
        np.maximum.at(scores, numbers, sizes)
        return scores
    scores = np.bincount(numbers, sizes, count).astype(np.float64)
    return scores if reduce == "sum" else scores / np.maximum(np.bincount(numbers, minlength=count), 1)


class Rooms:
    """What may still be lost: by a BatchNorm down to its floor, by an end of any other layer down to one channel."""

    def __init__(self, channels: ChannelMap, units: Units, floors: Ints, coupling: Coupling) -> None:
        widths = np.array([layer.width for layer in channels.layers])
        mine = units.owners >= 0
        rooms, owners, capacity = [units.layers[mine]], [units.owners[mine]], [np.maximum(widths - floors, 0)]
        if coupling == "group":  # a selection stands in wherever single gammas would empty another layer
            norms = {layer.name: channels.ends[layer.name] for layer in channels.layers}
            unit_of = np.full(len(channels.fixed), -1)
            for numbers in zip(*norms.values(), strict=True):
                unit_of[np.concatenate(numbers)[mine]] = units.owners[mine]
            sides = [side for name, both in channels.ends.items() if name not in norms for side in both]
            for room, side in enumerate(sides, len(widths)):
                found = unit_of[side]
                owners.append(found[found >= 0])
                rooms.append(np.full(len(owners[-1]), room))
            capacity.append(np.array([len(side) - 1 for side in sides]))
        self._rooms, self._owners = np.concatenate(rooms), np.concatenate(owners)
        self._capacity = np.concatenate(capacity)

    def left(self, taken: Flags) -> Ints:
        """Say what each room can still lose, (rooms,), once these units, (units,), are gone; negative = too much."""
        return self._capacity - np.bincount(self._rooms[taken[self._owners]], minlength=len(self._capacity))

    @cached_property
    def needs(self) -> list[dict[int, int]]:
        """Per unit what it takes from which room."""
        pairs, counts = np.unique(self._owners * len(self._capacity) + self._rooms, return_counts=True)
        owners, rooms = np.divmod(pairs, len(self._capacity))
        bounds = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
        takes = list(zip(rooms.tolist(), counts.tolist(), strict=True))
        return [dict(takes[start:end]) for start, end in pairwise(bounds)]


def _sizes(scores: Mapping[str, Tensor], layer: Layer) -> NDArray[np.float64]:
    if layer.name not in scores:
        raise ValueError(f"no gammas are given for BatchNorm '{layer.name}'")
    score = scores[layer.name]
    if score.shape != (layer.width,):
        raise ValueError(f"BatchNorm '{layer.name}' has {layer.width} channels, its gammas are {tuple(score.shape)}")
    return magnitudes_of(layer.name, score)


def magnitudes_of(name: str, gamma: Tensor) -> NDArray[np.float64]:
    """Give |gamma| of a BatchNorm; ValueError if one is not finite."""
    if not bool(torch.isfinite(gamma).all()):
        raise ValueError(f"BatchNorm '{name}' has gammas that are NaN or infinite; train again with a lower rate")
    magnitudes: NDArray[np.float64] = gamma.detach().double().abs().cpu().numpy()  # holds every smaller type exactly
    return magnitudes
