"""The channel map: which gammas of a network can be removed, what goes with each, and why the others stay."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from netslim.prune.map.classes import CONSTANT, Ints, merged
from netslim.prune.map.counts import UNHASHABLE
from netslim.prune.map.families import Family, Structure, families, structures, table_of_families, table_of_norms
from netslim.prune.map.flow import Flow
from netslim.prune.map.layers import Coupling, Ends, Layer, Loose, few
from netslim.prune.record import (
    Course,
    Example,
    Failed,
    Recorder,
    arguments,
    check,
    doubled,
    on_a_copy,
    said,
    tensors_of,
    weight_of,
)


@dataclass(frozen=True)
class ChannelMap:
    """Which producers, BatchNorm entries and consumers share a channel, in the order of execution.

    `layers` holds every BatchNorm, `modules` the channels of every layer with weights. A channel can be removed, in all
    modules, if it is not `fixed` and gammas i are removed of all BatchNorms whose `inputs[i]` or `outputs[i]` it is.
    """

    layers: tuple[Layer, ...]
    modules: tuple[Ends, ...]
    fixed: tuple[bool, ...]
    """True = the channel of this number stays."""
    notes: tuple[str, ...] = ()
    """What the user should know of what was not mapped, in one line each."""
    loose: tuple[Loose, ...] = ()
    """Parameters and buffers of no layer of torch's, which shrink with the channels along one dimension or two."""

    def prunable(self, model: nn.Module, coupling: Coupling = "group") -> dict[str, Tensor]:
        """Map each BatchNorm with a removable gamma to its mask: (width,) bool, True = removable."""
        return {
            name: torch.tensor(self._by_name[name].removable(coupling), device=gamma.device)
            for name, gamma in self.named_gammas(model, coupling).items()
        }

    def gammas(self, model: nn.Module, coupling: Coupling = "group") -> list[nn.Parameter]:
        """List the gammas that sparsity training should pull to zero: those of BatchNorms with a removable one.

        A gamma is whole, (width,), also where only some of its channels are prunable; `prunable` has the masks.
        """
        return list(self.named_gammas(model, coupling).values())

    def named_gammas(self, model: nn.Module, coupling: Coupling = "group") -> dict[str, nn.Parameter]:
        """Map the name of each BatchNorm with a removable gamma to its gamma; ValueError if the model differs."""
        found: dict[str, nn.Parameter] = {}
        for layer in self.layers:
            gamma = weight_of(model, layer.name)
            if gamma is None and not any(layer.removable(coupling)):
                continue
            if not isinstance(gamma, nn.Parameter) or len(gamma) != layer.width:
                raise ValueError(
                    f"the channel map is of another network: no BatchNorm of {layer.width} at '{layer.name}'"
                )
            if any(layer.removable(coupling)):
                found[layer.name] = gamma
        return found

    @cached_property
    def ends(self) -> dict[str, tuple[Ints, Ints]]:
        """The numbers of the channels at the two ends of each of the `modules`, as arrays: inputs, outputs."""
        return {end.name: (np.asarray(end.inputs), np.asarray(end.outputs)) for end in self.modules}

    @cached_property
    def structures(self) -> dict[int, Structure]:
        """The layers that share each class: its BatchNorms, and the others that make and that read its channels."""
        return structures(self.layers, self.ends, len(self.fixed))

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def together(self, *, alone: bool = False) -> dict[tuple[str, ...], frozenset[int]]:
        """Put together the classes of the same BatchNorms, by their names; or of each one BatchNorm, `alone`."""
        if alone:
            return {(layer.name,): frozenset(layer.classes) for layer in self.layers}
        found: dict[tuple[str, ...], set[int]] = {}
        for number, (norms, _, _) in self.structures.items():
            found.setdefault(norms, set()).add(number)
        return {norms: frozenset(classes) for norms, classes in found.items()}

    def holding(self, classes: Collection[int], why: str) -> ChannelMap:
        """Copy the map with these classes held, for the reason given."""
        fixed = np.array(self.fixed)
        layers = []
        for layer in self.layers:
            held = np.isin(layer.classes, list(classes))
            for side in self.ends[layer.name]:
                fixed[side[held]] = True
            layers.append(
                replace(
                    layer,
                    holds=tuple(why if is_held else hold for is_held, hold in zip(held, layer.holds, strict=True)),
                    selects=tuple(one and not is_held for is_held, one in zip(held, layer.selects, strict=True)),
                )
            )
        return replace(self, layers=tuple(layers), fixed=tuple(fixed.tolist()))

    def families(self) -> tuple[Family, ...]:
        """Put together the channel classes that the same layers share, in the order of execution."""
        return families(self.layers, self.structures)

    def sizes(self, coupling: Coupling = "group") -> list[tuple[int, int]]:
        """Count per BatchNorm the channels that are removable under this coupling, and all."""
        return [(sum(layer.removable(coupling)), layer.width) for layer in self.layers]

    def count(self, coupling: Coupling = "group") -> str:
        """Say how many of all channels are removable under this coupling."""
        removable, width = (sum(sizes) for sizes in zip(*self.sizes(coupling), strict=True))
        how = "prunable" if coupling == "group" else "removable one by one"
        return f"{removable} of {width} channels are {how}"

    def summary(self, coupling: Coupling = "group") -> str:
        """Say in one line how many channels are removable under this coupling, and why the others stay."""
        return "; ".join(part for part in (self.count(coupling), self.kept_by(coupling)) if part)

    def kept_by(self, coupling: Coupling = "group") -> str:
        """Give the commonest reasons why channels are not removable under this coupling; empty if all are."""
        kept: Counter[str] = Counter()
        for layer in self.layers:
            if coupling == "group":
                kept.update(dict(layer.reasons))
            else:
                kept.update(why or _NOTHING for why, one in zip(layer.holds, layer.selects, strict=True) if not one)
        return few([f"{count} stay: {reason}" for reason, count in kept.most_common()], most=2, between="; ")

    def table(self) -> str:
        """Describe the map, a row per family of channels that the same layers share; `str` has one per BatchNorm."""
        return table_of_families(self.families(), self.count())

    def __repr__(self) -> str:  # what a notebook shows: the numbers would fill pages
        return table_of_norms(self.layers, self.modules, self.count())


def map_channels(model: nn.Module, example: Example, coupling: Coupling = "group") -> ChannelMap:
    """Find out by a run of the network which channels belong together; the model is unchanged.

    Labels of channels go through every torch function that its forward calls, in eval and in training mode, so no
    architecture has to be known, and no layer by its class: layers are where parameters go into a convolution, a linear
    function or a batch normalisation. A gamma is prunable if nothing holds a channel of its class: every layer that
    mixes channels reads zeros there once all gammas and betas of the class are zero, and no function needs the channel
    for its number. Where the two modes call different functions, what holds a channel in either holds it.

    Args: example, as the network is called: images (n, 3, height, width), or a tuple, list or dictionary of arguments;
    on the model's device and in its dtype.
    Raises: ValueError if the network does not run on the example, or if nothing is removable under the coupling.
    """
    check(model, example)
    try:
        channels = on_a_copy(model, example, _map)
    except Failed as failed:
        raise ValueError(said(failed, example)) from failed.error
    if not channels.layers:
        raise ValueError("the network has no BatchNorm layer, so there is no gamma to slim by")
    if not any(any(layer.removable(coupling)) for layer in channels.layers):
        raise ValueError(f"no channel of the network is prunable: {channels.kept_by(coupling)}")
    return channels


def _follow(model: nn.Module, example: Example, *, watch: bool = False, hashes: bool = False) -> Flow:
    """Run a copy of a network in both modes, and follow its labels; what holds in any run holds.

    A network that draws random numbers while it runs is run with several seeds in each mode. Where values come up that
    nothing accounts for, all is done again, watched for compiled code; and where it looks up a number of channels.

    Raises: `Failed` where it does not run in eval mode.
    """
    seen: list[Course] = []
    flow = Flow(model, hashes=hashes)
    for some, is_training in ((example, False), (doubled(example), True)):
        for seed in range(_SEEDS):
            try:
                recorder, is_random = _run(model, some, seed, None if seen else flow, is_training, watch=watch)
                if seen and recorder.record.course not in seen:
                    recorder, _ = _run(model, some, seed, flow, is_training, watch=watch)
            except Failed as failed:
                if UNHASHABLE in str(failed.error) and not hashes:
                    return _follow(model, example, watch=watch, hashes=True)
                if not is_training or tensors_of(example)[0].is_meta:
                    raise  # with numbers it may run
                flow.notes.append(f"training mode was not looked at: {said(failed, some)}")
                break
            if recorder.has_strangers and not watch:
                return _follow(model, example, watch=True, hashes=hashes)
            seen.append(recorder.record.course)
            if not is_random:
                break
    return flow


_SEEDS = 4
"""Of a network that draws random numbers, the runs in each mode."""


def _run(
    model: nn.Module, example: Example, seed: int, flow: Flow | None, is_training: bool, *, watch: bool
) -> tuple[Recorder, bool]:
    """Run a network once, and tell whether it drew random numbers of Python's, NumPy's or torch's on the CPU."""
    recorder = Recorder(model, flow, watch=watch)
    random.seed(seed)
    np.random.seed(seed)  # the generator that networks draw from
    torch.default_generator.manual_seed(seed)
    before = _random_states()
    recorder.run(*arguments(example), is_training=is_training)
    return recorder, _random_states() != before


def _random_states() -> tuple[object, ...]:
    state = np.random.get_state(legacy=False)["state"]
    return (
        random.getstate(),
        (state["pos"], state["key"].tobytes()),
        torch.default_generator.get_state().numpy().tobytes(),
    )


def _map(model: nn.Module, example: Example) -> ChannelMap:
    return _numbered(_follow(model, example))


def _numbered(flow: Flow) -> ChannelMap:
    """Make the map of what a flow found out: numbers in place of labels."""
    shrinking = flow.layers.settle()
    roots, (held, reasons) = flow.classes.roots(), flow.classes.holds()
    uses = [(name, use) for use in flow.layers.uses.values() for name in use.names]
    ends = [(roots[use.inputs.numpy()], roots[use.outputs.numpy()]) for _, use in uses]
    norms = [end for (_, use), end in zip(uses, ends, strict=True) if use.normalises]
    before, after = (np.concatenate([_NONE, *side]) for side in (zip(*norms, strict=True) if norms else ((), ())))
    shared = merged(roots, before, after)  # a class: all channels that BatchNorms connect
    class_held = np.full_like(held, len(reasons))
    np.minimum.at(class_held, shared, held)
    loose = {name: tuple(None if d is None else roots[d.numpy()] for d in dims) for name, dims in shrinking.items()}
    used = np.zeros(len(roots), bool)
    sides = (side for group in (ends, loose.values()) for each in group for side in each if side is not None)
    used[np.concatenate([[CONSTANT], *sides])] = True
    number = used.cumsum() - 1  # few and small numbers for the map
    free = np.zeros(len(roots), bool)  # a channel that can go, and that another layer has
    others = [side for (_, use), both in zip(uses, ends, strict=True) for side in both if not use.normalises]
    free[np.concatenate([_NONE, *others])] = True
    free &= held == len(reasons)
    texts, layers = [*reasons, ""], []
    for (name, use), (inputs, outputs) in zip(uses, ends, strict=True):
        if use.normalises and name == use.names[0]:
            own = np.minimum(held[inputs], held[outputs])
            why = np.where(own < len(reasons), own, class_held[shared[inputs]])
            holds = tuple(map(texts.__getitem__, why.tolist()))
            classes = tuple(number[shared[inputs]].tolist())
            shrinks = (free[inputs] | free[outputs]) & use.is_selectable
            layers.append(Layer(name, classes, holds, tuple(shrinks.tolist()), use.shift))
    made = {name: (number[inputs], number[outputs]) for (name, _), (inputs, outputs) in zip(uses, ends, strict=True)}
    modules = tuple(Ends(name, use.kind, *(tuple(side.tolist()) for side in made[name])) for name, use in uses)
    shrunk = tuple(
        Loose(name, tuple(None if d is None else tuple(number[d].tolist()) for d in dims))
        for name, dims in loose.items()
    )
    fixed = tuple((held[used] < len(reasons)).tolist())
    channels = ChannelMap(tuple(layers), modules, fixed, (*flow.notes, *flow.layers.notes), shrunk)
    vars(channels)["ends"] = made  # at hand: making arrays of the tuples again took a third of a plan's time
    return channels


_NOTHING = "no layer would shrink with them"
_NONE = np.zeros(0, np.int64)
