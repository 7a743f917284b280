"""Functions that compute each element by itself: where channels meet, they are one from then on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netslim.prune.map.classes import CONSTANT, Classes, Ints, compact, tight, varying
from netslim.prune.map.counts import Count
from netslim.prune.map.operations import COPYING, RANDOM, Labelled, Step
from netslim.prune.record import mapped, parts_of


def elementwise(classes: Classes, step: Step) -> Labelled:
    """Take labels through a function that computes each element by itself: channels that meet live or die together.

    Whether a channel of zeros stays one is tried: on zeros in its place, and any numbers where the others are.
    """
    if parts_of((step.args, step.kwargs), Count):
        return None, "computed from the number of channels"
    shape, operands = step.shape, step.operands
    if step.name == "prelu" and operands[1].dim() == 1:
        operands[1] = operands[1].view(-1, *(1,) * (operands[0].dim() - 2))
    try:
        wide = [operand.expand(shape) for operand in operands]
    except RuntimeError:
        return None, f"'{step.name}' with these arguments"
    free = [classes.is_free(operand) for operand in operands]
    holding = [n for n, labels in enumerate(wide) if varying(labels) and not free[n]]
    if not holding:
        holding = [n for n, labels in enumerate(wide) if varying(labels)]
    if not holding:
        return channelless(operands, shape)
    if any(varying(wide[n]) != varying(wide[holding[0]]) for n in holding):
        wide = [folded(classes, labels) if n in holding else labels for n, labels in enumerate(wide)]
    deep = varying(wide[holding[0]])
    if any(varying(wide[n]) != deep for n in holding):
        return None, f"'{step.name}' of values with different channels"
    met = [*holding]
    for n in (n for n in range(len(wide)) if n not in holding):
        sizes = [_size_at(operands[n], dim - len(shape)) for dim in deep]
        if all(size == 1 for size in sizes):
            if not is_constant(operands[n]):
                classes.freeze(operands[n], f"one value for many channels at {step.place}")
        elif free[n]:
            _bind(classes, wide[holding[0]], wide[n], deep)
            met.append(n)
        else:
            return None, f"'{step.name}' of values with different channels"
    first = compact(wide[holding[0]])
    for n in holding[1:]:
        classes.join(first, compact(wide[n]))
    parameter = classes.cause(f"'{step.name}' of a parameter at {step.place}") if len(met) > len(holding) else 0
    raws = [classes.raw(compact(wide[n]).flatten()) if n in holding else np.full(first.numel(), parameter) for n in met]
    raw = _rawness(classes, step, met, raws)
    if len(met) == 1 and (raw == raws[0]).all():
        return wide[met[0]], None
    made = classes.fresh(first.numel(), raw).view(first.shape)
    classes.join(first, made)
    return made.expand(shape), None


def together(classes: Classes, parts: Sequence[Tensor], dim: int, shape: torch.Size) -> Tensor | None:
    """Lay values side by side along a dimension that holds no channels: theirs are the same, one by one."""
    deep = varying(parts[0])
    lines = [compact(part) for part in parts]
    if not deep or dim in deep or any(each.shape != lines[0].shape for each in lines):
        return None
    made = classes.fresh(lines[0].numel(), np.max([classes.raw(each.flatten()) for each in lines], 0))
    for each in lines:
        classes.join(each.flatten(), made)
    return made.view(lines[0].shape).expand(shape)


def folded(classes: Classes, labels: Tensor) -> Tensor:
    """Label anew what varies along a dimension in which all live or die together: there by one label."""
    some = compact(labels)
    gone = tuple(varying(some) - varying(tight(torch.from_numpy(classes.roots()[some.numpy()]))))
    if not gone:
        return labels
    raw = classes.raw(some).max(gone, keepdims=True)
    for dim in gone:
        some = some.narrow(dim, 0, 1)
    made = classes.fresh(some.numel(), raw.flatten()).view(some.shape)
    classes.join(some, made)
    return made.expand(labels.shape)


def raised(classes: Classes, labels: Tensor, cause: str) -> Tensor:
    """Label values that go with these channels and are not zero when they are."""
    some = compact(labels)
    made = classes.fresh(some.numel(), classes.cause(cause)).view(some.shape)
    classes.join(some, made)
    return made.expand(labels.shape)


def not_zero(step: Step) -> str:
    """Say that a function makes something of zeros."""
    return f"operation '{step.name}' is not zero at zero at {step.place}"


def is_constant(labels: Tensor) -> bool:
    """Tell whether no label is one of a channel."""
    return not labels.numel() or bool((compact(labels) == CONSTANT).all())


def no_channels(shape: torch.Size) -> Tensor:
    """Label a value that holds no channels."""
    return torch.tensor(CONSTANT, device="cpu").expand(shape)


def channelless(operands: Sequence[Tensor], shape: torch.Size) -> Labelled:
    """Label what is made of values without dimensions of channels; such a value may be a channel by itself."""
    known = [operand for operand in operands if not is_constant(operand)]
    if not known:
        return no_channels(shape), None
    if len(operands) == 1:
        return compact(known[0]).flatten()[0].expand(shape), None
    return None, "a single value"


def _size_at(labels: Tensor, dim: int) -> int:
    """Give a size by its dimension from the right, negative; 1 where there is none."""
    return labels.shape[dim] if -dim <= labels.dim() else 1


def _bind(classes: Classes, labels: Tensor, parameter: Tensor, deep: set[int]) -> None:
    """Let the elements of a parameter belong to the channels that they meet."""
    for dim in range(labels.dim()):
        if dim not in deep and parameter.stride(dim) == 0:
            parameter = parameter.narrow(dim, 0, min(1, parameter.shape[dim]))
    classes.join(compact(labels).expand(parameter.shape), parameter)


def _rawness(classes: Classes, step: Step, met: Sequence[int], raws: Sequence[Ints]) -> Ints:
    """Say of each channel what makes it raw, (channels,), 0 = it stays zero; met: the operands that have it."""
    if step.name in COPYING:
        return raws[0]
    patterns = sum((flags > 0).astype(np.int64) << order for order, flags in enumerate(raws))
    every: Ints = np.max(raws, 0)  # what came last is said
    made, cause = np.zeros_like(every), 0
    for pattern in np.unique(patterns).tolist():
        here = patterns == pattern
        zeros = [n for order, n in enumerate(met) if not pattern >> order & 1]
        if zeros and step.name not in RANDOM and _is_zero(step, zeros):
            continue
        if not every[here].all():
            cause = cause or classes.cause(not_zero(step))
        made[here] = np.where(every[here] > 0, every[here], cause)
    return made


def _is_zero(step: Step, zeros: Sequence[int]) -> bool:
    """Try the function on zeros for these operands, and on any numbers for the others."""
    if step.name == "prelu":
        return 0 in zeros  # its slopes are one for each channel, which a single row of values has not
    order = -1

    def tried(value: Any) -> Any:
        nonlocal order
        if not isinstance(value, Tensor):
            return value
        order += 1
        kind = step.kinds[order]
        return torch.zeros(4, dtype=kind, device="cpu") if order in zeros else _any_of(kind)

    try:
        result = step.function(*mapped(step.args, tried), **mapped(step.kwargs, tried))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(result, Tensor) and not bool(torch.isnan(result.double()).any() or result.any())


def _any_of(kind: torch.dtype) -> Tensor:
    """Make numbers that stand for any, but for zero: what is divided by that is no number."""
    some = (True, False, True, False) if kind == torch.bool else (1, -1, 2, 3)
    return torch.tensor(some, device="cpu").to(kind)
