"""Operations that compute new values of channels: element by element where channels meet, or over places.

What keeps channels apart gives labels; what does not gives none, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netslim.prune.map import operations as ops
from netslim.prune.map.classes import CONSTANT, Classes, compact, varying
from netslim.prune.map.moves import Count


def joined(
    classes: Classes, name: str, args: Any, kwargs: Any, value: Tensor, place: str
) -> tuple[Tensor | None, str | None]:
    """Take labels through a sum, difference, product or quotient: channels that meet live or die together."""
    left, right = (*args, *(kwargs[key] for key in ("input", "other") if key in kwargs))[:2]
    if isinstance(left, Count) or isinstance(right, Count):
        return None, "computed from the number of channels"
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        labels = left if isinstance(left, Tensor) else right
        if name in ops.SCALING and (isinstance(left, Tensor) or "mul" in name):
            return labels, None
        return _raised(classes, labels, f"a number is added or divided at '{place}'"), None
    a, b = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]
    if varying(a) != varying(b) or a.shape != value.shape:
        return _spread_over(classes, name, left, right, place)
    a, b = compact(a), compact(b)
    classes.join(a, b)
    raw_a, raw_b = classes.raw(a.flatten()), classes.raw(b.flatten())
    raw = np.where(raw_a > 0, raw_a, raw_b)
    if name in ops.SCALING:  # 0 times anything is 0; 0 divided by 0 is not
        raw = np.where((raw_a > 0) & ((raw_b > 0) | ("mul" not in name)), raw_a, 0)
        if "mul" not in name:
            raw = np.where(raw_b > 0, raw, classes.cause(f"divided by a channel that becomes zero at '{place}'"))
    made = classes.fresh(a.numel(), raw).view(a.shape)
    classes.join(a, made)
    return made.expand(value.shape), None


def _spread_over(
    classes: Classes, name: str, left: Tensor, right: Tensor, place: str
) -> tuple[Tensor | None, str | None]:
    """Join channels with one value for them all, which has to stay: a gate over places, a learnt scale."""
    wide, narrow = (left, right) if varying(left) else (right, left)
    shape = (1,) * (wide.dim() - narrow.dim()) + tuple(narrow.shape)
    if varying(narrow) or wide.dim() < narrow.dim() or any(shape[d] != 1 for d in varying(wide)):
        return None, f"'{name}' of values with different channels"
    classes.freeze(narrow, f"one value for many channels at '{place}'")
    shape = torch.broadcast_shapes(wide.shape, narrow.shape)  # type: ignore[no-untyped-call]
    if "mul" in name or (name in ops.SCALING and wide is left):
        return wide.expand(shape), None
    return _raised(classes, wide.expand(shape), f"'{name}' of one value to many channels at '{place}'"), None


def _raised(classes: Classes, labels: Tensor, cause: str) -> Tensor:
    """Label values that go with these channels and are not zero when they are."""
    some = compact(labels)
    made = classes.fresh(some.numel(), classes.cause(cause)).view(some.shape)
    classes.join(some, made)
    return made.expand(labels.shape)


def shifted(classes: Classes, labels: Tensor, name: str, place: str) -> Tensor:
    """Label what an operation that is not zero at zero makes of these channels."""
    return _raised(classes, labels, f"operation '{name}' is not zero at zero at '{place}'")


def pooled(labels: Tensor, num_dims: int, shape: Sequence[int]) -> tuple[Tensor | None, str | None]:
    """Change the sizes of the last dimensions, which may hold no channels."""
    kept = labels.dim() - num_dims
    if any(dim >= kept for dim in varying(labels)):
        return None, "channels pooled together"
    for dim in range(kept, labels.dim()):
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(shape), None


def averaged(name: str, args: Any, kwargs: Any) -> tuple[Tensor | None, str | None]:
    """Take labels through a mean or sum, which may not be one over channels."""
    labels: Tensor = args[0] if args else kwargs["input"]
    dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    dims = range(labels.dim()) if dims is None else (dims,) if isinstance(dims, int) else dims or range(labels.dim())
    gone = {dim % labels.dim() for dim in dims}
    if gone & varying(labels):
        return None, f"'{name}' over channels"
    for dim in sorted(gone, reverse=True):
        labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
    return labels, None


def filling(module: nn.Module | None, args: Any, kwargs: Any) -> tuple[Sequence[int], float | None]:
    """Read off a padding its amounts, from the last dimension on, and the number it fills in; None = copies."""
    if module is not None:
        return module.padding, getattr(module, "value", None)  # type: ignore[return-value]
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    return given["pad"], None if given.get("mode", "constant") != "constant" else given.get("value") or 0


def padded(
    labels: Tensor, amounts: Sequence[int], fill: float | None, shape: Sequence[int]
) -> tuple[Tensor | None, str | None]:
    """Pad places with anything, and channels with zeros, which are no channels."""
    vary = varying(labels)
    ends = {labels.dim() - 1 - order: amounts[2 * order : 2 * order + 2] for order in range(len(amounts) // 2)}
    deep = {dim: tuple(ends[dim]) for dim in vary & ends.keys() if any(ends[dim])}
    if deep and (fill != 0 or min(min(pair) for pair in deep.values()) < 0):
        return None, "'pad' copies or cuts off channels, or makes some of a number"
    for dim in range(labels.dim()):
        if dim not in vary:
            labels = labels.narrow(dim, 0, 1)
    labels = F.pad(labels, [n for dim in reversed(range(labels.dim())) for n in deep.get(dim, (0, 0))], value=CONSTANT)
    return labels.expand(shape), None
