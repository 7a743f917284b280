"""Results without numbers of the commonest functions: torch's meta device takes up to a millisecond for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from netslim.prune.record.functions import words

_ALIKE = words(
    "relu relu6 leaky_relu silu gelu hardswish hardsigmoid hardtanh tanh elu mish sigmoid dropout batch_norm"
)
_MEETING = frozenset(("add", "mul", "sub"))


def shaped(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, inplace: bool) -> Tensor | None:
    """Make what a function would make of values on the meta device; None where torch has to be asked."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.is_meta or type(x) is not Tensor:
        return None
    if name in _ALIKE and x.is_floating_point():
        return x if inplace else _alike(x)
    if name in _MEETING and len(args) == 2 and not kwargs:
        other = args[1]
        alike = isinstance(other, Tensor) and other.is_meta and other.shape == x.shape and other.dtype == x.dtype
        return (x if inplace else _alike(x)) if alike else None
    if name == "conv2d" and not kwargs and len(args) == 7:
        return _convolved(*args)
    return None


def _alike(x: Tensor) -> Tensor:
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor | None:
    """Compute the shape of a convolution; None where it takes more than arithmetic, or does not fit."""
    plain = all(type(each) is tuple and len(each) == 2 for each in (stride, padding, dilation))
    if not plain or x.dim() != 4 or x.shape[1] != weight.shape[1] * groups or x.dtype != weight.dtype:
        return None
    spans = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(size + 2 * pad - step * (kernel - 1) - 1) // jump + 1 for size, kernel, jump, pad, step in spans]
    if min(sizes) < 1 or weight.shape[0] % groups:
        return None
    return x.new_empty((x.shape[0], weight.shape[0], *sizes))
