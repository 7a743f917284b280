"""What removed gammas mean for every layer: which channels die, and where a selection has to stand in for one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from netslim.prune.choose.plan import Plan, Selection, Slice, Trim
from netslim.prune.map import ChannelMap

Flags = NDArray[np.bool_]


Changes = tuple[tuple[Slice, ...], tuple[Selection, ...], tuple[Trim, ...]]


def realise(channels: ChannelMap, gone: Mapping[str, Flags]) -> Changes:
    """Slice the layers, and select channels around those BatchNorms that lose gammas of channels that stay.

    Args: gone, per BatchNorm (width,), True = the gamma is removed.
    """
    dead = _dead(channels, gone)
    slices, selections = [], []
    loose = {each.name for each in channels.loose}
    for name, (inputs, outputs) in channels.ends.items():
        num_inputs, num_outputs = len(inputs), len(outputs)
        live_inputs, live_outputs = ~dead[inputs], ~dead[outputs]
        if name in gone:
            keep = ~gone[name]
            if not keep.all():
                slices.append(Slice(name=name, num_inputs=num_inputs, num_outputs=num_outputs, outputs=_indices(keep)))
            before = None if live_inputs[~keep].sum() == 0 else _indices(keep[live_inputs])
            after = None if live_outputs[~keep].sum() == 0 else _indices(keep[live_outputs])
            if before or after:
                arriving, leaving = int(live_inputs.sum()), int(live_outputs.sum())
                selections.append(
                    Selection(name=name, num_before=arriving, num_after=leaving, before=before, after=after)
                )
        elif name not in loose and not (live_inputs.all() and live_outputs.all()):
            reads = None if live_inputs.all() else _indices(live_inputs)
            makes = None if live_outputs.all() else _indices(live_outputs)
            slices.append(Slice(name=name, num_inputs=num_inputs, num_outputs=num_outputs, inputs=reads, outputs=makes))
    return tuple(slices), tuple(selections), tuple(_trims(channels, dead))


def restricted(plan: Plan, channels: ChannelMap, names: Collection[str]) -> Plan:
    """Make the plan that removes of a plan only what it removes of the BatchNorms named."""
    gone, layers = {}, []
    for layer in plan.layers:
        flags = np.ones(layer.width, bool)
        flags[list(layer.kept)] = False
        gone[layer.name] = flags if layer.name in names else np.zeros(layer.width, bool)
        layers.append(layer if layer.name in names else replace(layer, kept=tuple(range(layer.width))))
    slices, selections, trims = realise(channels, gone)
    removed = sum(int(flags.sum()) for flags in gone.values())
    return replace(
        plan,
        threshold=plan.threshold if removed else None,
        num_removed=removed,
        layers=tuple(layers),
        slices=slices,
        selections=selections,
        trims=trims,
    )


def _trims(channels: ChannelMap, dead: Flags) -> Iterator[Trim]:
    for loose in channels.loose:
        for dim, numbers in enumerate(loose.dims):
            if numbers is not None and dead[list(numbers)].any():
                kept = _indices(~dead[list(numbers)])
                yield Trim(name=loose.name, dim=dim, size=len(numbers), kept=kept)


def _dead(channels: ChannelMap, gone: Mapping[str, Flags]) -> Flags:
    """Tell which channels, (numbers,), no one needs any more; every layer keeps one at each end."""
    total = len(channels.fixed)
    own = [(side, flags) for name, flags in gone.items() for side in channels.ends[name]]
    touched = np.bincount(np.concatenate([side for side, _ in own]), minlength=total)
    removed = np.bincount(np.concatenate([side[flags] for side, flags in own]), minlength=total)
    dead: Flags = (touched > 0) & (touched == removed) & ~np.asarray(channels.fixed)
    sides = [side for both in channels.ends.values() for side in both]
    sides += [np.asarray(numbers) for loose in channels.loose for numbers in loose.dims if numbers is not None]
    emptied = [side for side in sides if dead[side].all()]
    while emptied:
        dead[emptied[0][0]] = False  # its gamma stays removed, by a selection
        emptied = [side for side in emptied if dead[side].all()]
    return dead


def _indices(flags: Flags) -> tuple[int, ...]:
    return tuple(np.flatnonzero(flags).tolist())
