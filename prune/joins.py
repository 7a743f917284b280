"""Operations that work element by element: the channels that meet in them, and what of them is zero once removed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from netslim.prune import operations as ops
from netslim.prune.classes import Classes, compact, varying
from netslim.prune.moves import Count


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
