"""Torch's own layers with weights, and how wide they are."""

from __future__ import annotations

from torch import Tensor, nn

NORMALISING = nn.modules.batchnorm._BatchNorm  # 1d, 2d, 3d and SyncBatchNorm
CONVOLVING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCING = (*CONVOLVING, nn.Linear)
INSTANCE_NORMALISING = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
WEIGHTED = (NORMALISING, *PRODUCING)


def is_plain(module: nn.Module) -> bool:
    """Tell whether a layer computes exactly what torch's own convolution, linear layer or BatchNorm does."""
    kind = type(module)
    for base in (*PRODUCING, nn.BatchNorm1d, nn.SyncBatchNorm):  # BatchNorm1d, 2d and 3d share one forward
        inner = "_conv_forward" if hasattr(base, "_conv_forward") else "forward"
        if kind.forward is base.forward and getattr(kind, inner, None) is getattr(base, inner):
            return True
    return False


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name every convolution, linear layer and BatchNorm of a network."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def widths(layer: nn.Module) -> tuple[int, int]:
    """Count the features at the two ends of a convolution, linear layer or BatchNorm: inputs, outputs."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, CONVOLVING):
        return layer.in_channels, layer.out_channels
    num_features = getattr(layer, "num_features", None)
    if not isinstance(num_features, int):  # a BatchNorm of a class of the user's own
        num_features = len(layer.get_parameter("weight"))
    return num_features, num_features


def tensor_of(model: nn.Module, name: str) -> Tensor | None:
    """Find a parameter or buffer by its name; None if it is not there."""
    home, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(home)
    except AttributeError:
        return None
    return module._parameters.get(own, module._buffers.get(own))


def weight_of(model: nn.Module, name: str) -> Tensor | None:
    """Find the weight of a layer by its name in a map: a module's, or a tensor's own; None if it is not there."""
    own = tensor_of(model, f"{name}.weight")
    return tensor_of(model, name) if own is None else own
