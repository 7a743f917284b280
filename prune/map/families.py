"""The channel map for readers: channels that the same layers share, in one row each, and one row per BatchNorm."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from netslim.prune.map.classes import CONSTANT, Ints
from netslim.prune.map.layers import Ends, Layer, aligned, few

Sides = Mapping[str, tuple[Ints, Ints]]
"""The numbers of the channels at the two ends of each layer with weights: inputs, outputs."""
Structure = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""The names of the BatchNorms that some channels go through, and of the other layers that make and that read them."""


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


def families(layers: Sequence[Layer], shared: Mapping[int, Structure]) -> tuple[Family, ...]:
    """Put together the classes that have the same layers and the same reason to stay, in the order of execution."""
    gammas = Counter(number for layer in layers for number in layer.classes)
    holds = {n: hold for x in reversed(layers) for n, hold in zip(x.classes, x.holds, strict=True)}
    bound = {layer.name for layer in layers if not layer.selectable}
    alike: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str], list[int]] = defaultdict(list)
    for number, structure in shared.items():
        alike[(*structure, holds[number])].append(number)
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


def structures(layers: Sequence[Layer], ends: Sides, num_channels: int) -> dict[int, Structure]:
    """List the BatchNorms, makers and readers of each class, in the order of execution."""
    norms, makers, readers = (defaultdict[int, list[str]](list) for _ in range(3))
    for layer in layers:
        for number in dict.fromkeys(layer.classes):
            norms[number].append(layer.name)
    names = {layer.name for layer in layers}
    class_of = _class_of_channel(layers, ends, num_channels)
    for name, (inputs, outputs) in ends.items():
        for found, side in ((makers, outputs), (readers, inputs)) if name not in names else ():
            for number in np.unique(class_of[side]).tolist():
                found[number].append(name)
    return {number: (tuple(norms[number]), tuple(makers[number]), tuple(readers[number])) for number in norms}


def _class_of_channel(layers: Sequence[Layer], ends: Sides, num_channels: int) -> Ints:
    """Map the number of each channel to its class, (num_channels,), -1 where no BatchNorm has it."""
    class_of = np.full(num_channels, -1)
    for layer in layers:
        for side in ends[layer.name]:
            class_of[side] = layer.classes
    class_of[CONSTANT] = -1
    return class_of


def table_of_families(found: Sequence[Family], last: str) -> str:
    """Describe a map, a row per family, and a last line."""
    notes: dict[str, int] = {}
    rows = [("classes", "gammas", "BatchNorms", "made by -> read by", "")]
    for one in found:
        state = f"{'one by one' if one.selectable else 'stay'} {_note(notes, one.why)}" if one.why else "prunable"
        path = f"{few(one.makers) or '?'} -> {few(one.readers) or '?'}"
        rows.append((str(one.num_classes), str(one.num_gammas), few(one.norms), path, state))
    return _noted(rows, ">><<<", notes, last)


def table_of_norms(layers: Sequence[Layer], modules: Sequence[Ends], last: str) -> str:
    """Describe a map, a row per BatchNorm, and a last line."""
    notes: dict[str, int] = {}
    rows = [("BatchNorm", "width", "prunable", "made by -> read by", "stay")]
    norms = {layer.name for layer in layers}
    ends = [(end.name, set(end.inputs), set(end.outputs)) for end in modules]
    own = {name: (inputs, outputs) for name, inputs, outputs in ends if name in norms}
    for layer in layers:
        inputs, outputs = own[layer.name]
        makers = [name for name, _, made in ends if name not in norms and not made.isdisjoint(inputs)]
        readers = [name for name, read, _ in ends if not read.isdisjoint(outputs - {CONSTANT})]
        path = f"{few(makers) or '?'} -> {few(readers) or '?'}"
        why = ", ".join(f"{count} {_note(notes, reason)}" for reason, count in layer.reasons)
        rows.append((layer.name, str(layer.width), str(layer.num_prunable), path, why))
    return _noted(rows, "<>><<", notes, last)


def _note(notes: dict[str, int], reason: str) -> str:
    """Refer to a reason by its number: many rows share one, and some are long."""
    return f"[{notes.setdefault(reason, len(notes) + 1)}]"


def _noted(rows: Sequence[tuple[str, ...]], sides: str, notes: dict[str, int], last: str) -> str:
    return "\n".join([*aligned(rows, sides), *(f"[{number}] {reason}" for reason, number in notes.items()), last])
