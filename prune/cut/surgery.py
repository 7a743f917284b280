"""The surgery: a plan applied to a network, and the proof that it does what it says."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netslim.prune.choose import Plan
from netslim.prune.cut.resize import fitting_layers, resize, scatter, sliced, surround
from netslim.prune.map import NORMALISING, leaves, replica

TOLERANCE = 1e-5
"""Largest accepted difference between the cut and the masked network, relative to max(1, largest |logit|)."""


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """Make the smaller network of the plan: plain torch layers with fewer channels; the model is unchanged.

    A BatchNorm that needs a selection becomes a sequence with the BatchNorm in it, under the same name. Device, dtype,
    memory format, train or eval mode and requires_grad stay as they are. Gradients are not copied.

    Raises: ValueError, before anything is copied, if the plan is of another network.
    """
    layers = fitting_layers(model, plan)
    memo: dict[int, object] = {}
    for part in plan.slices:
        layer = layers[part.name]
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.dim():  # not num_batches_tracked
                memo[id(tensor)] = sliced(layer, name, tensor, part)
    # the memo hands over the sliced weights, so the removed ones are never copied
    small = replica(model, memo)
    for part in plan.slices:
        resize(small.get_submodule(part.name), part)
    for around in plan.selections:
        surround(small, around)
    return small


def norm_of(small: nn.Module, name: str) -> nn.modules.batchnorm._BatchNorm:
    """Find a BatchNorm in a cut network by its name in the uncut one: a selection may stand around it."""
    module = small.get_submodule(name)
    norm = module if isinstance(module, NORMALISING) else module.get_submodule("norm")
    assert isinstance(norm, NORMALISING), "so `surround` names it"
    return norm


@torch.no_grad()
def embed(model: nn.Module, small: nn.Module, plan: Plan) -> nn.Module:
    """Copy the network with the weights of `small`, of `cut(model, plan)`'s shapes, in their places: `cut`'s inverse.

    Gamma and beta of the removed channels are 0, so that the copy computes what `small` computes; a plan of the copy
    for more channels removes these first.

    Raises: ValueError as `cut` does.
    """
    whole = masked(model, plan)
    parts = {part.name: part for part in plan.slices}
    for name, layer in whole.named_modules():
        source = norm_of(small, name) if name in plan.kept else small.get_submodule(name)
        tensors = dict((*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)))
        for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            scatter(layer, key, tensor, parts.get(name), tensors[key])
    return whole


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy the network with gamma and beta of the removed channels at 0: what `cut` has to equal, and raises alike."""
    return silenced(model, plan, ("weight", "bias"))


def silenced(model: nn.Module, plan: Plan, names: Sequence[str]) -> nn.Module:
    """Copy the network with these parameters of the removed channels at 0; raises as `cut` does."""
    fitting_layers(model, plan)
    twin = copy.deepcopy(model)
    for layer in plan.layers:
        gone = sorted(set(range(layer.width)) - set(layer.kept))
        norm = twin.get_submodule(layer.name)
        with torch.no_grad():
            for name, parameter in norm.named_parameters(recurse=False):
                if name in names:
                    parameter[gone] = 0
    return twin


def largest_difference(model: nn.Module, small: nn.Module, plan: Plan, example: Tensor) -> float:
    """Measure max |small - masked(model)| over all outputs, relative to max(1, max |masked(model)|).

    In eval mode and in float64, so that rounding cannot hide a wrong channel; float32 on devices without float64.

    Args: example (n, 3, height, width); its device is where the two copies run.
    """
    dtype = _widest(example.device)
    with torch.no_grad():
        want = _outputs(masked(model, plan), example, dtype)
        have = _outputs(copy.deepcopy(small), example, dtype)
    return relative_difference(have, want)


def relative_difference(have: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Measure max |have - want| over all tensors, relative to max(1, max |want|); infinite where one is not finite.

    Raises: RuntimeError if there is nothing to compare, or shapes differ.
    """
    if not want or [t.shape for t in want] != [t.shape for t in have]:
        raise RuntimeError("the network's outputs have other shapes than the original's")
    scale = max([1.0, *(t.abs().max().item() for t in want)])
    # against infinite or NaN logits nothing can be proved
    differences = [
        torch.nan_to_num(a - b, nan=math.inf, posinf=math.inf, neginf=-math.inf)
        for a, b in zip(have, want, strict=True)
    ]
    return (
        max(difference.abs().max().item() for difference in differences) / scale if math.isfinite(scale) else math.inf
    )


def prove(model: nn.Module, small: nn.Module, plan: Plan, example: Tensor) -> float:
    """Return `largest_difference`, or raise RuntimeError where it exceeds the tolerance: then the cut is wrong.

    Raises: ValueError where the network's own outputs are NaN or infinite, so that there is nothing to compare with.
    """
    difference = largest_difference(model, small, plan, example)
    if math.isinf(difference) and not _is_finite(masked(model, plan), example):
        raise ValueError(
            "the network's outputs are NaN or infinite, so no cut can be proved: its weights are damaged, or training "
            "diverged; train again with a lower learning rate"
        )
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the cut network differs from the masked one by {difference:.2g}, more than {TOLERANCE:g}: "
            "the network does something that its channel map does not show; please report it with the network"
        )
    return difference


@torch.no_grad()
def _is_finite(twin: nn.Module, example: Tensor) -> bool:
    return all(bool(torch.isfinite(output).all()) for output in _outputs(twin, example, _widest(example.device)))


def _widest(device: torch.device) -> torch.dtype:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # Apple's GPUs
        return torch.float32
    return torch.float64


def _outputs(model: nn.Module, example: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return leaves(model.to(example.device, dtype).eval()(example.to(dtype)), Tensor)
