"""Operations over places: what pools, averages, resizes or pads an image keeps its channels apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from netslim.prune.classes import CONSTANT, varying


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
