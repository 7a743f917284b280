"""Absorption: the constants that removed channels gave, put into the layers that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from netslim.prune.choose import Plan, Slice
from netslim.prune.cut import silenced
from netslim.prune.record import Questions, recorded
from netslim.prune.repair.reconstruction import add_constant

_SAME = 1e-5
"""Largest difference, relative to the values, of a channel between two images that counts as none."""


@torch.no_grad()
def absorb(model: nn.Module, small: nn.Module, plan: Plan, images: Tensor) -> list[str]:
    """Give the layers of the cut network, in place, what the removed channels' betas contributed.

    A channel whose gamma is zero still gives a constant: its beta, through the activation. What a convolution or linear
    layer makes of it goes into its bias, or into the mean of the BatchNorm that alone reads it. That is exact where the
    sum is the same at every place; at padded borders, where fewer weights meet the constant, the mean over all places
    is taken. Channels that are not constant, as behind a gate that looks at the image, are left out.

    Args: images (2 or more, 3, height, width), of which constants are told from values; any will do.
    Returns: the names of the layers that took in something.
    """
    norms, taken = Questions(small, recorded(small, images)).norms_after, []
    for part, shift in _shifts(silenced(model, plan, ("weight",)).eval(), plan, images):
        layer = small.get_submodule(part.name)
        assert isinstance(layer, nn.Conv2d | nn.Linear), "asked before"
        if shift.any() and add_constant(layer, norms.get(part.name), shift):
            taken.append(part.name)
    return taken


def _shifts(twin: nn.Module, plan: Plan, images: Tensor) -> list[tuple[Slice, Tensor]]:
    """Say for each layer that loses inputs what the constant ones among them add to each kept output, (outputs,)."""
    found: list[tuple[Slice, Tensor]] = []
    hooks = []
    for part in plan.slices:
        layer = twin.get_submodule(part.name)
        if part.inputs is not None and isinstance(layer, nn.Conv2d | nn.Linear):

            def keep(_: nn.Module, inputs: tuple[Tensor, ...], part: Slice = part, layer: Any = layer) -> None:
                found.append((part, _shift(layer, part, inputs[0])))

            hooks.append(layer.register_forward_pre_hook(keep))
    twin(images)
    return found


def _shift(layer: nn.Conv2d | nn.Linear, part: Slice, inputs: Tensor) -> Tensor:
    dim = 1 if isinstance(layer, nn.Conv2d) else -1
    values = inputs.movedim(dim, 0).flatten(1)
    gone = torch.ones(part.num_inputs, dtype=torch.bool, device=inputs.device)
    gone[list(part.inputs or ())] = False
    is_constant = gone & (values.amax(1) - values.amin(1) <= _SAME * values.abs().amax(1))
    shape = [1] * inputs.dim()
    shape[dim] = -1
    alone = inputs[:1] * is_constant.view(shape)
    change = layer.forward(alone) - layer.forward(torch.zeros_like(alone))
    shift = change.movedim(dim, 0).flatten(1).mean(1)
    return shift if part.outputs is None else shift[list(part.outputs)]
