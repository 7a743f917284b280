"""The channel map for readers: channels that the same layers share, in one row each, and one row per BatchNorm."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from netslim.prune.classes import CONSTANT, Ints
from netslim.prune.tracing import few

if TYPE_CHECKING:
    from netslim.prune.channels import ChannelMap


@dataclass(frozen=True)
class Family:
    """Channel classes that the same layers share: each of them goes from all these layers, or stays in all.

    Names are in the order of execution.
    """

    num_classes: int
    num_gammas: int
    norms: tuple[str, ...]
    """The BatchNorms whose gammas they are."""
    makers: tuple[str, ...]
    """The other layers with weights that make the channels."""
    readers: tuple[str, ...]
    """The other layers with weights that read them."""
    why: str
    """Why they stay; empty = they are prunable."""
    selectable: bool
    """Whether all their gammas can be removed one by one."""


def families(channels: ChannelMap) -> tuple[Family, ...]:
    """Put together the classes that have the same layers and the same reason to stay, in the order of execution."""
    norms, makers, readers = _layers_by_class(channels)
    gammas = Counter(number for layer in channels.layers for number in layer.classes)
    holds = {n: hold for x in reversed(channels.layers) for n, hold in zip(x.classes, x.holds, strict=True)}
    bound = {layer.name for layer in channels.layers if not layer.selectable}
    alike: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str], list[int]] = defaultdict(list)
    for number in norms:
        alike[tuple(norms[number]), tuple(makers[number]), tuple(readers[number]), holds[number]].append(number)
    return tuple(
        Family(
            num_classes=len(numbers),
            num_gammas=sum(gammas[number] for number in numbers),
            norms=those,
            makers=before,
            readers=after,
            why=why,
            selectable=bound.isdisjoint(those),
        )
        for (those, before, after, why), numbers in alike.items()
    )


_Names = dict[int, list[str]]


def _layers_by_class(channels: ChannelMap) -> tuple[_Names, _Names, _Names]:
    """List the BatchNorms, makers and readers of each class."""
    norms, makers, readers = (defaultdict[int, list[str]](list) for _ in range(3))
    for layer in channels.layers:
        for number in dict.fromkeys(layer.classes):
            norms[number].append(layer.name)
    names = {layer.name for layer in channels.layers}
    class_of = _class_of_channel(channels)
    for name, (inputs, outputs) in channels.ends.items():
        for found, side in ((makers, outputs), (readers, inputs)) if name not in names else ():
            for number in np.unique(class_of[side]).tolist():
                found[number].append(name)
    return norms, makers, readers


def _class_of_channel(channels: ChannelMap) -> Ints:
    """Map the number of each channel to its class, -1 where no BatchNorm has it."""
    class_of = np.full(len(channels.fixed), -1)
    for layer in channels.layers:
        for side in channels.ends[layer.name]:
            class_of[side] = layer.classes
    class_of[CONSTANT] = -1
    return class_of


def table_of_families(channels: ChannelMap) -> str:
    """Describe the map, a row per family."""
    notes: dict[str, int] = {}
    rows = [("classes", "gammas", "BatchNorms", "made by -> read by", "")]
    for one in families(channels):
        state = f"{'one by one' if one.selectable else 'stay'} {_note(notes, one.why)}" if one.why else "prunable"
        path = f"{few(one.makers) or '?'} -> {few(one.readers) or '?'}"
        rows.append((str(one.num_classes), str(one.num_gammas), few(one.norms), path, state))
    return _aligned(rows, ">><<<", notes, channels.count())


def table_of_norms(channels: ChannelMap) -> str:
    """Describe the map, a row per BatchNorm."""
    notes: dict[str, int] = {}
    rows = [("BatchNorm", "width", "prunable", "made by -> read by", "stay")]
    norms = {layer.name for layer in channels.layers}
    ends = [(end.name, set(end.inputs), set(end.outputs)) for end in channels.modules]
    own = {name: (inputs, outputs) for name, inputs, outputs in ends if name in norms}
    for layer in channels.layers:
        inputs, outputs = own[layer.name]
        makers = [name for name, _, made in ends if name not in norms and not made.isdisjoint(inputs)]
        readers = [name for name, read, _ in ends if not read.isdisjoint(outputs - {CONSTANT})]
        path = f"{few(makers) or '?'} -> {few(readers) or '?'}"
        why = ", ".join(f"{count} {_note(notes, reason)}" for reason, count in layer.reasons)
        rows.append((layer.name, str(layer.width), str(layer.num_prunable), path, why))
    return _aligned(rows, "<>><<", notes, channels.count())


def _note(notes: dict[str, int], reason: str) -> str:
    """Refer to a reason by its number: many rows share one, and some are long."""
    return f"[{notes.setdefault(reason, len(notes) + 1)}]"


def _aligned(rows: Sequence[tuple[str, ...]], sides: str, notes: dict[str, int], last: str) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *(f"[{number}] {reason}" for reason, number in notes.items()), last])
