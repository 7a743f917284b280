"""The surgery: a plan applied to a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from netslim.prune.choose import Plan
from netslim.prune.cut.resize import (
    fitting_layers,
    own_tensors,
    put_back,
    resize,
    retell,
    scatter,
    sliced,
    surround,
    trimmed,
)
from netslim.prune.record import replica, tensor_of


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """Make the smaller network of the plan: plain torch layers with fewer channels; the model is unchanged.

    A BatchNorm that needs a selection becomes a sequence with the BatchNorm in it, under the same name. Device, dtype,
    memory format, train or eval mode and requires_grad stay as they are. Gradients are not copied.

    Raises: ValueError, before anything is copied, if the plan is of another network.
    """
    layers = fitting_layers(model, plan)
    memo: dict[int, object] = {}
    parts = [part for part in plan.slices if part.name in layers]
    for part in parts:
        for name, tensor in own_tensors(layers[part.name]).items():
            memo[id(tensor)] = sliced(layers[part.name], name, tensor, part)
    for trim in plan.trims:
        whole = tensor_of(model, trim.name)
        if whole is None:
            continue  # only told its size
        before = memo.get(id(whole), whole)  # another dimension of it may be trimmed already
        assert isinstance(before, Tensor), "so it is put there"
        memo[id(whole)] = trimmed(before, trim)
    # the memo hands over the sliced weights, so the removed ones are never copied
    small = replica(model, memo)
    for part in parts:
        resize(small.get_submodule(part.name), part)
    for trim in plan.trims:
        retell(small, trim)
    for around in plan.selections:
        surround(small, around)
    return small


class Scaled(Protocol):
    """A BatchNorm by its name, as plans and channel maps have it."""

    @property
    def name(self) -> str: ...
    @property
    def shift(self) -> str | None: ...


def norm_of(small: nn.Module, name: str) -> nn.Module:
    """Find a BatchNorm in a cut network by its name in the uncut one: a selection may stand around it."""
    module = small.get_submodule(name)
    return module if "weight" in module._parameters else module.get_submodule("norm")


def scales_of(network: nn.Module, layer: Scaled) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Find gamma and beta of a BatchNorm of a plan, in the cut network or in the uncut one.

    A selection may stand around it in the cut one; a BatchNorm may have no beta.
    """
    if tensor_of(network, layer.name) is not None:
        gamma, beta = tensor_of(network, layer.name), tensor_of(network, layer.shift or "")
    else:
        norm = norm_of(network, layer.name)
        gamma, beta = norm._parameters["weight"], norm._parameters.get("bias")
    assert isinstance(gamma, nn.Parameter), "a layer of the plan"
    assert beta is None or isinstance(beta, nn.Parameter), "beside a gamma"
    return gamma, beta


@torch.no_grad()
def embed(model: nn.Module, small: nn.Module, plan: Plan) -> nn.Module:
    """Copy the network with the weights of `small`, of `cut(model, plan)`'s shapes, in their places: `cut`'s inverse.

    Gamma and beta of the removed channels are 0, so that the copy computes what `small` computes; a plan of the copy
    for more channels removes these first.

    Raises: ValueError as `cut` does.
    """
    whole = masked(model, plan)
    parts, trims = {part.name: part for part in plan.slices}, defaultdict(list)
    for trim in plan.trims:
        trims[trim.name].append(trim)
    norms = {around.name for around in plan.selections}
    for name, layer in whole.named_modules():
        source = small.get_submodule(f"{name}.norm" if name in norms else name)
        tensors = dict((*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)))
        for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            path = f"{name}.{key}" if name else key
            if path in trims:
                put_back(tensor, trims[path], tensors[key])
            else:
                scatter(layer, key, tensor, parts.get(name), tensors[key])
    return whole


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy the network with gamma and beta of the removed channels at 0: what `cut` has to equal, and raises alike."""
    return silenced(model, plan, ("weight", "bias"))


def silenced(model: nn.Module, plan: Plan, names: Sequence[str]) -> nn.Module:
    """Copy the network with these parameters of the removed channels at 0; raises as `cut` does."""
    fitting_layers(model, plan)
    twin = replica(model, {})
    for layer in plan.layers:
        gone = sorted(set(range(layer.width)) - set(layer.kept))
        if gone:
            gamma, beta = scales_of(twin, layer)
            with torch.no_grad():
                for name, parameter in (("weight", gamma), ("bias", beta)):
                    if name in names and parameter is not None:
                        parameter[gone] = 0
    return twin
