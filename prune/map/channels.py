"""The channel map: which gammas of a network can be removed, what goes with each, and why the others stay."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from netslim.prune.map import operations as ops
from netslim.prune.map.classes import CONSTANT, Ints, merged
from netslim.prune.map.copies import on_a_copy
from netslim.prune.map.families import Family, families, table_of_families, table_of_norms
from netslim.prune.map.flow import Flow
from netslim.prune.map.layers import Coupling, Ends, Layer, few
from netslim.prune.map.tracing import traces


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
            module = _submodule(model, layer.name)
            if not isinstance(module, ops.NORMALISING) or module.num_features != layer.width:
                raise ValueError(
                    f"the channel map is of another network: no BatchNorm of {layer.width} at '{layer.name}'"
                )
            if any(layer.removable(coupling)):
                found[layer.name] = module.weight
        return found

    @cached_property
    def ends(self) -> dict[str, tuple[Ints, Ints]]:
        """The numbers of the channels at the two ends of each of the `modules`, as arrays: inputs, outputs."""
        return {end.name: (np.asarray(end.inputs), np.asarray(end.outputs)) for end in self.modules}

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def families(self) -> tuple[Family, ...]:
        """Put together the channel classes that the same layers share, in the order of execution."""
        return families(self.layers, self.ends, len(self.fixed))

    def count(self, coupling: Coupling = "group") -> str:
        """Say how many of all channels are removable under this coupling."""
        removable = sum(sum(layer.removable(coupling)) for layer in self.layers)
        how = "prunable" if coupling == "group" else "removable one by one"
        return f"{removable} of {sum(layer.width for layer in self.layers)} channels are {how}"

    def summary(self, coupling: Coupling = "group") -> str:
        """Say in one line how many channels are removable under this coupling, and why the others stay."""
        return "; ".join(part for part in (self.count(coupling), self.kept_by(coupling)) if part)

    def kept_by(self, coupling: Coupling = "group") -> str:
        """Give the commonest reasons why channels are not removable under this coupling; empty if all are."""
        kept: Counter[str] = Counter()
        for layer in self.layers:
            if coupling == "group" or not layer.selectable:
                kept.update(dict(layer.reasons))
        return few([f"{count} stay: {reason}" for reason, count in kept.most_common()], most=2, between="; ")

    def table(self) -> str:
        """Describe the map, a row per family of channels that the same layers share; `str` has one per BatchNorm."""
        return table_of_families(self.families(), self.count())

    def __str__(self) -> str:
        return table_of_norms(self.layers, self.modules, self.count())


def map_channels(model: nn.Module, example: Tensor, coupling: Coupling = "group") -> ChannelMap:
    """Find out by torch.fx which channels belong together; the model is unchanged.

    Labels of channels flow through the network's graph, so no architecture has to be known. A gamma is prunable if
    nothing holds a channel of its class: every layer that mixes channels reads zeros there once all gammas and betas
    of the class are zero, and no operation needs the channel for its number.

    Args: example (n, 3, height, width), on the model's device and in its dtype; only its first image is used.
    Raises: ValueError if torch.fx cannot trace the network, if the example does not fit, or if nothing is removable
    under the coupling.
    """
    if not any(isinstance(module, ops.NORMALISING) for module in model.modules()):
        raise ValueError("the network has no BatchNorm layer, so there is no gamma to slim by")
    if example.dim() < 2 or not example.numel():
        raise ValueError(f"an example of shape {tuple(example.shape)} is no batch of images (n, 3, height, width)")
    channels = _channels(on_a_copy(model, example[:1], _flow))
    if not any(any(layer.removable(coupling)) for layer in channels.layers):
        raise ValueError(f"no channel of the network is prunable: {channels.kept_by(coupling)}")
    return channels


def _flow(model: nn.Module, example: Tensor) -> Flow:
    found = traces(model)
    flow = Flow(model, found.opaque)
    for graph in found.graphs:
        flow.run(graph, example)
    return flow


def _channels(flow: Flow) -> ChannelMap:
    roots, (held, reasons) = flow.classes.roots(), flow.classes.holds()
    uses = list(flow.uses.values())
    ends = [(roots[use.inputs.numpy()], roots[use.outputs.numpy()]) for use in uses]
    norms = [end for use, end in zip(uses, ends, strict=True) if use.normalises]
    before, after = (np.concatenate(side) for side in zip(*norms, strict=True))
    shared = merged(roots, before, after)  # a class: all channels that BatchNorms connect
    class_held = np.full_like(held, len(reasons))
    np.minimum.at(class_held, shared, held)
    used = np.zeros(len(roots), bool)
    used[np.concatenate([[CONSTANT], *(side for end in ends for side in end)])] = True
    number = used.cumsum() - 1  # few and small numbers for the map
    texts, layers = [*reasons, ""], []
    for use, (inputs, outputs) in zip(uses, ends, strict=True):
        if use.normalises:
            own = np.minimum(held[inputs], held[outputs])
            why = np.where(own < len(reasons), own, class_held[shared[inputs]])
            holds = tuple(map(texts.__getitem__, why.tolist()))
            classes = tuple(number[shared[inputs]].tolist())
            layers.append(Layer(use.name, classes, holds, use.name not in flow.trouble))
    numbered = {use.name: (number[inputs], number[outputs]) for use, (inputs, outputs) in zip(uses, ends, strict=True)}
    modules = tuple(Ends(use.name, use.kind, *(tuple(side.tolist()) for side in numbered[use.name])) for use in uses)
    channels = ChannelMap(tuple(layers), modules, tuple((held[used] < len(reasons)).tolist()))
    vars(channels)["ends"] = numbered  # at hand: making arrays of the tuples again took a third of a plan's time
    return channels


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
