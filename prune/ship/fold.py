"""BatchNorm folded into the layer before it: fewer operations for a network that will not be trained again."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from netslim.prune.cut import TOLERANCE, relative_difference
from netslim.prune.record import (
    CONVOLVING,
    NORMALISING,
    Example,
    Questions,
    call,
    is_plain,
    recorded,
    replica,
    tensors_of,
)


def folded(model: nn.Module, example: Example) -> nn.Module:
    """Copy the network, in eval mode, with each BatchNorm folded into the convolution or linear layer before it.

    Only where nothing but the BatchNorm reads that layer's output, both are called once, and both are torch's own. A
    network that would give other outputs comes back as a plain copy; the model is unchanged.

    Args: example, as the network is called, on the model's device and in its dtype.
    """
    twin = replica(model, {}).eval()
    small = replica(twin, {})
    names = {id(module): name for name, module in small.named_modules()}
    for name, norm in Questions(small, recorded(small, example)).norms_after.items():
        layer = _fused(small.get_submodule(name), norm)
        if layer is not None:
            small.set_submodule(name, layer)
            small.set_submodule(names[id(norm)], nn.Identity())
    with torch.no_grad():
        difference = relative_difference(tensors_of(call(small, example)), tensors_of(call(twin, example)))
    return small if difference <= TOLERANCE else twin


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """Make one layer of the two; None for kinds that torch cannot fuse, and for subclasses: what they do is unknown."""
    if not isinstance(norm, NORMALISING) or not is_plain(norm):
        return None
    if isinstance(layer, nn.Linear) and type(layer) is nn.Linear:
        return fuse_linear_bn_eval(layer, norm)
    if not isinstance(layer, CONVOLVING) or type(layer) not in CONVOLVING:
        return None
    if layer.transposed and layer.groups > 1:
        return None
    return fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)
