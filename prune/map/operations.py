"""What the channel map knows about torch's operations, asked by function object, never by a user's name for it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Reading these of a value tells nothing about its channels.
METADATA = frozenset({"size", "dim", "ndimension", "numel", "element_size", "is_floating_point", "stride"})
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"})

# Of two numbers; on a number of channels the result is one again, or a plain number.
COUNTING = (operator.mul, operator.floordiv, operator.getitem)

RESHAPING = frozenset({"view", "reshape", "flatten"})
CHOOSING = frozenset({"chunk", "split", "getitem"})
ORDERING = frozenset({"permute", "transpose", "cat", "concat", "concatenate", "squeeze", "unsqueeze"})
MOVING = RESHAPING | CHOOSING | ORDERING

# f(0) = 0, element by element: a channel of zeros stays one.
_ACTIVATING = {
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "gelu",
    "hardswish",
    "tanh",
    "elu",
    "selu",
    "celu",
    "mish",
    "softsign",
    "softshrink",
    "hardshrink",
    "tanhshrink",
    "abs",
    "neg",
    "square",
    "sqrt",
}
COPYING = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "detach", "clone", "contiguous"})
PASSING = COPYING | _ACTIVATING
# Element by element too, but f(0) is another number.
SHIFTING = frozenset({"sigmoid", "hardsigmoid", "softplus", "exp", "cos"})
# Element by element; whether f(0) = 0 depends on the limits.
LIMITING = frozenset({"hardtanh", "clamp", "clip", "threshold"})
# Two values, element by element.
JOINING = frozenset({"add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv"})
SCALING = frozenset({"mul", "imul", "div", "truediv", "itruediv"})
POOLING = {
    f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)
}  # name -> number of trailing dimensions that are pooled
AVERAGING = frozenset({"mean", "sum", "amax", "amin"})
# f(s x) = s f(x) for s > 0.
HOMOGENEOUS = RESHAPING | COPYING | set(POOLING) | {"relu", "leaky_relu", "mean", "index_select"}
OTHERS = frozenset({"interpolate", "pad", "channel_shuffle"})

NORMALISING = nn.modules.batchnorm._BatchNorm  # 1d, 2d, 3d and SyncBatchNorm
CONVOLVING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCING = (*CONVOLVING, nn.Linear)
WEIGHTED = (NORMALISING, *PRODUCING)
_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "clone",
    nn.Flatten: "flatten",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout",
    nn.Dropout3d: "dropout",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Softplus: "softplus",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.Mish: "mish",
    nn.Softsign: "softsign",
    nn.Hardtanh: "hardtanh",
    nn.Threshold: "threshold",
    nn.Softshrink: "softshrink",
    nn.Hardshrink: "hardshrink",
    nn.Tanhshrink: "tanhshrink",
    nn.Upsample: "interpolate",
    nn.UpsamplingNearest2d: "interpolate",
    nn.UpsamplingBilinear2d: "interpolate",
    nn.ChannelShuffle: "channel_shuffle",
    nn.MaxPool1d: "max_pool1d",
    nn.MaxPool2d: "max_pool2d",
    nn.MaxPool3d: "max_pool3d",
    nn.AvgPool1d: "avg_pool1d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AvgPool3d: "avg_pool3d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.AdaptiveMaxPool3d: "adaptive_max_pool3d",
}
_PADS = ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad")
_MODULES |= {getattr(nn, f"{kind}{n}d"): "pad" for kind in _PADS for n in (1, 2, 3)}
_KNOWN = MOVING | PASSING | SHIFTING | LIMITING | JOINING | set(POOLING) | AVERAGING | OTHERS
_ELSEWHERE = {("torchvision.ops.stochastic_depth", "stochastic_depth"): "dropout"}  # torch.fx.wrap makes it a leaf


def _named_functions() -> dict[Callable[..., Any], str]:
    names: dict[Callable[..., Any], str] = {}
    for home in (torch, F, operator):
        for name in sorted(_KNOWN):
            for spelling in (name, f"{name}_"):
                function = getattr(home, spelling, None)
                if callable(function):
                    names.setdefault(function, name)
    return names


_FUNCTIONS = _named_functions()


def name_of(node: fx.Node, module: nn.Module | None) -> str:
    """Name the operation of a node as the sets above do, in-place ones alike; an unknown one as it is written."""
    if module is not None:
        if type(module) is nn.PReLU and module.num_parameters == 1:
            return "leaky_relu"  # with a slope that is learnt
        # Exact types: a subclass may compute anything.
        return _MODULES.get(type(module), type(module).__name__)
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    assert callable(node.target), "fx: every other call is one of a function"
    if node.target is getattr:
        return f"getattr {node.args[1]}"
    known = _FUNCTIONS.get(node.target)
    if known is None:
        word = getattr(node.target, "__name__", str(node.target))
        known = _ELSEWHERE.get((getattr(node.target, "__module__", ""), word), f"{word} (function)")
    return known


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
    assert isinstance(layer, NORMALISING), "nothing else has weights that are cut"
    return layer.num_features, layer.num_features


def reads_no_values(name: str) -> bool:
    """Tell whether an operation looks at a tensor's shape or kind alone."""
    return name in METADATA or name.removeprefix("getattr ") in ATTRIBUTES


def keeps_zero(node: fx.Node, name: str, module: nn.Module | None, args: Any, kwargs: Any) -> bool:
    """Tell whether an element-by-element operation leaves a channel of zeros one; its limits are tried on a zero."""
    if name not in LIMITING:
        return name in PASSING
    rest = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    try:
        return not apply_to_labels(node, name, module, (torch.zeros(1), *args[1:]), rest).any()
    except (RuntimeError, TypeError):  # limits that are tensors
        return False


def apply_to_labels(node: fx.Node, name: str, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    """Execute a moving operation on label tensors."""
    if module is not None:
        return module.forward(*args, **kwargs)
    if name == "view":  # labels are stored expanded, which view refuses
        return Tensor.reshape(*args, **kwargs)
    if node.op == "call_method":
        return getattr(Tensor, str(node.target))(*args, **kwargs)
    assert callable(node.target), "fx: every other call is one of a function"
    return node.target(*args, **kwargs)
