"""BatchNorm folded into the layer before it: fewer operations for a network that will not be trained again."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from netslim.prune.cut import TOLERANCE, relative_difference
from netslim.prune.map import CONVOLVING, NORMALISING, leaves, trace


def folded(model: nn.Module, example: Tensor) -> nn.Module:
    """Copy the network, in eval mode, with each BatchNorm folded into the convolution or linear layer before it.

    Only where nothing but the BatchNorm reads that layer's output. A network that torch.fx cannot trace, or that would
    give other outputs, comes back as a plain copy; the model is unchanged.

    Args: example (n, 3, height, width) on the model's device and in its dtype.
    """
    twin = copy.deepcopy(model).eval()
    try:
        small = fx.GraphModule(twin, trace(twin, {}))
    except ValueError:
        return twin
    for node in [*small.graph.nodes]:
        _fold(small, node)
    small.delete_all_unused_submodules()
    small.recompile()
    with torch.no_grad():
        difference = relative_difference(leaves(small(example), Tensor), leaves(twin(example), Tensor))
    return small if difference <= TOLERANCE else twin


def _fold(model: fx.GraphModule, node: fx.Node) -> None:
    """Replace a BatchNorm's call and that of the layer before it by one; leave any other node as it is."""
    norm, before = _module(model, node), node.args[0] if node.args else None
    if not isinstance(norm, NORMALISING) or norm.running_mean is None or not isinstance(before, fx.Node):
        return
    layer = None if len(before.users) > 1 else _fused(_module(model, before), norm)
    if layer is not None:
        # a name of its own: either module may be called elsewhere too
        node.target = f"{node.name}_folded"
        model.add_submodule(node.target, layer)
        node.args, node.kwargs = before.args, before.kwargs
        model.graph.erase_node(before)


def _fused(layer: nn.Module | None, norm: nn.modules.batchnorm._BatchNorm) -> nn.Module | None:
    """Make one layer of the two; None for kinds that torch cannot fuse, and for subclasses: what they do is unknown."""
    if isinstance(layer, nn.Linear) and type(layer) is nn.Linear:
        return fuse_linear_bn_eval(layer, norm)
    if not isinstance(layer, CONVOLVING) or type(layer) not in CONVOLVING:
        return None
    if layer.transposed and layer.groups > 1:
        return None
    return fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)


def _module(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None
