"""Functions over dimensions: places are pooled, padded and sampled, values are added up, multiplied and normalised."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from netslim.prune.map.classes import CONSTANT, Classes, along, compact, line, varying
from netslim.prune.map.counts import Count
from netslim.prune.map.operations import LOCAL, Labelled, Step
from netslim.prune.map.values import channelless, elementwise, folded, no_channels, not_zero, raised, together
from netslim.prune.record import parts_of


def pooled(classes: Classes, step: Step) -> Labelled:
    """Take labels through a pooling over the last dimensions, or a change of their size: they may hold no channels."""
    labels = step.operands[0]
    kept = labels.dim() - LOCAL.get(step.name, labels.dim() - 2)
    if parts_of((step.args, step.kwargs), Count) or len(step.operands) > 1:
        return None, f"'{step.name}' with these arguments"
    if any(dim >= kept for dim in varying(labels)):
        return None, "channels pooled together"
    for dim in range(kept, labels.dim()):
        labels = labels.narrow(dim, 0, 1)
    if step.name.startswith("max_"):
        labels = _lifted(classes, labels)
    return labels.expand(step.shape), None


def _lifted(classes: Classes, labels: Tensor) -> Tensor:
    """Let zeros be zeros again that were padded with minus infinity: no maximum is taken there."""
    some = compact(labels)
    raw = classes.raw(some.flatten())
    if not raw.any() or any(classes.text(cause) != _BELOW for cause in set(raw[raw > 0].tolist())):
        return labels
    made = classes.fresh(some.numel()).view(some.shape)
    classes.join(some, made)
    return made.expand(labels.shape)


_BELOW = "padded with minus infinity"


def sampled(classes: Classes, step: Step) -> Labelled:
    """Take labels through a look-up at computed places: of regions, or of a grid."""
    labels, *others = step.operands
    if not varying(labels) <= {1}:
        return None, "channels sampled together"
    for other in others:
        classes.freeze(other, f"read by '{step.name}' at {step.place}")
    return along(line(labels, 1), 1, step.shape), None


def padded(classes: Classes, step: Step) -> Labelled:
    """Pad places with anything, and channels with zeros, which are no channels."""
    given = step.given("input", "pad", "mode", "value")
    labels, amounts = given["input"], given["pad"]
    if parts_of((amounts, given.get("value")), Count):
        return None, "'pad' by a number of channels"
    fill = None if given.get("mode", "constant") != "constant" else given.get("value") or 0
    vary = varying(labels)
    ends = {labels.dim() - 1 - order: amounts[2 * order : 2 * order + 2] for order in range(len(amounts) // 2)}
    deep = {dim: tuple(ends[dim]) for dim in vary & ends.keys() if any(ends[dim])}
    if deep and (fill != 0 or min(min(pair) for pair in deep.values()) < 0):
        return None, "'pad' copies or cuts off channels, or makes some of a number"
    for dim in range(labels.dim()):
        if dim not in vary:
            labels = labels.narrow(dim, 0, 1)
    labels = F.pad(labels, [n for dim in reversed(range(labels.dim())) for n in deep.get(dim, (0, 0))], value=CONSTANT)
    labels = labels.expand(step.shape)
    if fill == -math.inf and not classes.raw(compact(labels).flatten()).any():
        return raised(classes, labels, _BELOW), None
    return (raised(classes, labels, not_zero(step)) if fill else labels), None


def unfolded(classes: Classes, step: Step) -> Labelled:
    """Take labels into the columns of `unfold`: channels by places of a kernel."""
    labels = step.operands[0]
    if labels.dim() != 4 or len(step.shape) != 3 or not varying(labels) <= {1}:
        return None, f"'{step.name}' with these arguments"
    return along(line(labels, 1).repeat_interleave(step.shape[1] // labels.shape[1]), 1, step.shape), None


def shuffled(classes: Classes, step: Step) -> Labelled:
    """Take labels from blocks of channels to places (`pixel_shuffle`), or back: a block stays whole."""
    labels = step.operands[0]
    dim = labels.dim() - 3
    if not varying(labels) <= {dim}:
        return None, f"'{step.name}' of something else than whole channels"
    own = line(labels, dim)
    if step.name == "pixel_unshuffle":
        return along(own.repeat_interleave(step.shape[dim] // len(own)), dim, step.shape), None
    return along(_blocks(classes, own, len(own) // step.shape[dim]), dim, step.shape), None


def _blocks(classes: Classes, labels: Tensor, size: int) -> Tensor:
    blocks = labels.view(-1, size)
    classes.join(blocks[:, :1].expand_as(blocks), blocks)
    made = classes.fresh(len(blocks), classes.raw(blocks).max(1))
    classes.join(blocks[:, 0], made)
    return made


def gated(classes: Classes, step: Step) -> Labelled:
    """Take labels through a gated linear unit: of a pair of channels, the first times a function of the second."""
    given = step.given("input", "dim")
    labels = given["input"]
    dim = given.get("dim", -1) % labels.dim()
    if varying(labels) != {dim}:
        return None, "'glu' of something else than whole channels"
    first, second = line(labels, dim).chunk(2)
    classes.join(first, second)
    return along(first, dim, step.shape), None


def reduced(classes: Classes, step: Step) -> Labelled:
    """Take labels through a mean, sum or another figure over some dimensions, which may not be the channels'."""
    labels, shape, name = step.operands[0], step.shape, step.name
    rest = step.args[1:]
    if name in ("norm", "linalg_vector_norm"):
        rest = rest[1:]  # the order of the norm comes first
    if rest and isinstance(rest[0], bool):  # of std and var: unbiased
        rest = rest[1:]
    dims = rest[0] if rest else step.kwargs.get("dim", step.kwargs.get("axis"))
    dims = range(labels.dim()) if dims is None else (dims,) if isinstance(dims, int) else dims or range(labels.dim())
    gone = {dim % labels.dim() for dim in dims}
    if gone & varying(labels):
        labels = folded(classes, labels)
    if gone & varying(labels):
        if name != "sum" or varying(labels) - gone:
            return None, f"'{name}' over channels"
        classes.read(compact(labels).flatten(), f"{name} at {step.place}")
        return no_channels(shape), None
    for dim in sorted(gone, reverse=True):
        labels = labels.narrow(dim, 0, 1) if len(shape) == step.operands[0].dim() else labels.select(dim, 0)
    return labels.expand(shape), None


def summed_up(classes: Classes, step: Step) -> Labelled:
    """Take labels through sums from the first on, along a dimension that holds no channels."""
    given = step.given("input", "dim")
    labels = given["input"]
    if given["dim"] % labels.dim() in varying(labels):
        return None, f"'{step.name}' over channels"
    return labels, None


def softened(classes: Classes, step: Step) -> Labelled:
    """Take labels through a softmax over a dimension that holds no channels, or only values of one channel."""
    given = step.given("input", "dim")
    labels, dim = given["input"], given.get("dim")
    if dim is not None and dim % labels.dim() in varying(labels):
        labels = folded(classes, labels)
    if dim is None or dim % labels.dim() in varying(labels):
        return None, f"'{step.name}' over channels"
    return raised(classes, labels, not_zero(step)), None


def normalised(classes: Classes, step: Step) -> Labelled:
    """Take labels through a division by the length over some dimensions: channels of zeros add nothing to it."""
    given = step.given("input", "p", "dim")
    labels, dims = given["input"], given.get("dim", 1)
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    if varying(labels) & {dim % labels.dim() for dim in dims}:
        classes.read(compact(labels).flatten(), f"normalize at {step.place}")
    return labels, None


def instance_normalised(classes: Classes, step: Step) -> Labelled:
    """Take labels through a normalisation of each channel by itself, with its scale and shift where it has them."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats")
    given = step.given(*names)
    labels = given["input"]
    if varying(labels) != {1}:
        return None, "'instance_norm' of something else than whole channels"
    own = line(labels, 1)
    for other in (given.get(key) for key in names[1:5]):
        if isinstance(other, Tensor):
            if not classes.is_free(other):
                return None, "'instance_norm' computes its scale from other tensors"
            classes.join(own, other)
    if given.get("bias") is None and given.get("use_input_stats", True):
        return labels, None
    return raised(classes, labels, not_zero(step)), None


def matrix_product(classes: Classes, step: Step) -> Labelled:
    """Take labels through a product of matrices (..., m, k) and (..., k, n), one of which has channels along m or n.

    Channels along k of both are multiplied pair by pair and added up: zeros on either side add nothing.
    """
    left, right = step.operands[:2]
    if len(step.operands) > 2:
        return None, f"'{step.name}' with these arguments"
    return product(classes, left, right, step.shape)


def product(classes: Classes, left: Tensor, right: Tensor, shape: torch.Size) -> Labelled:
    """Do what `matrix_product` says."""
    if left.dim() < 2 or right.dim() < 2 or classes.is_free(left) or classes.is_free(right):
        return None, "'matmul' of a parameter, or of a vector"
    a, b = (side.expand(*shape[:-2], *side.shape[-2:]) for side in (left, right))
    last = len(shape) - 1
    if (last in varying(a)) != (last - 1 in varying(b)):
        return None, "'matmul' adds up channels by their place"
    rows, columns = last - 1 in varying(a), last in varying(b)
    if last in varying(a):
        one, other = a.select(last - 1, 0), b.select(last, 0)
        if rows or columns or varying(one) != varying(other):
            return None, "'matmul' of values with different channels"
        one, other = compact(one).flatten(), compact(other).flatten()
        classes.join(one, other)
        raw = (classes.raw(one) > 0) & (classes.raw(other) > 0)
        classes.read(one[torch.from_numpy(raw)], "a product of matrices")
        return no_channels(shape), None
    if not (rows or columns):
        return channelless((left, right), shape)
    source, other, dim = (a, b, last) if rows else (b, a, last - 1)
    if (rows and columns) or varying(other):
        return None, "'matmul' of values with channels in two dimensions"
    return source.narrow(dim, 0, 1).expand(shape), None


def contracted(classes: Classes, step: Step) -> Labelled:
    """Take labels through an einsum of two values: their product over all letters, of which some are added up."""
    equation, *operands = step.args
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return None, "'einsum' of other than two values, with a letter for each dimension"
    sides, _, result = equation.replace(" ", "").partition("->")
    letters = [*dict.fromkeys(result + sides.replace(",", ""))]
    sizes, wide = dict.fromkeys(letters, 1), []
    for side, labels in zip(sides.split(","), operands, strict=True):
        if len(set(side)) < len(side) or "->" not in equation:
            return None, "'einsum' over a diagonal, or with a result that is not written"
        sizes |= {letter: max(sizes[letter], size) for letter, size in zip(side, labels.shape, strict=True)}
        order = labels.permute([side.index(letter) for letter in letters if letter in side])
        wide.append(order[tuple(slice(None) if letter in side else None for letter in letters)])
    shape = torch.Size(sizes.values())
    made, why = elementwise(classes, replace(step, name="mul", function=torch.mul, args=tuple(wide), shapes=[shape]))
    gone = tuple(range(len(result), len(letters)))
    if made is None or not gone:
        return made, why
    return reduced(classes, replace(step, name="sum", args=(made, gone), shapes=step.shapes))


def attention(classes: Classes, step: Step) -> Labelled:
    """Take labels through scaled dot-product attention: the value's channels come out."""
    given = step.given("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    query, key, value, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    assert isinstance(query, Tensor), "attention has one"
    assert isinstance(key, Tensor), "attention has one"
    assert isinstance(value, Tensor), "attention has one"
    shape, dim = step.shape, len(step.shape) - 1
    if isinstance(mask, Tensor):
        classes.freeze(mask, f"read by '{step.name}' at {step.place}")
        if varying(mask) and not classes.is_free(mask):
            return None, f"'{step.name}' with a mask that has channels"
    if dim in varying(query) | varying(key):
        if given.get("scale") is None:
            why = f"'{step.name}' divides by the root of their number (give it a scale) at {step.place}"
            for each in (query, key):
                classes.freeze(each, why)
        else:
            _, why_not = product(classes, query, key.transpose(-1, -2), torch.Size((*shape[:-1], key.shape[-2])))
            if why_not is not None:
                return None, why_not
    if dim - 1 in varying(value):
        return None, f"'{step.name}' adds up channels by their place"
    return value.narrow(dim - 1, 0, 1).expand(shape), None


def put(classes: Classes, step: Step) -> Labelled:
    """Label a value into which another one is put, at places that hold all its channels."""
    whole, index, value = step.args
    if isinstance(index, Tensor) and not isinstance(value, Tensor):
        filling = replace(step, name="masked_fill", function=torch.masked_fill, shapes=[whole.shape])
        return elementwise(classes, filling)
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(part, slice) or type(part) is int for part in parts)
    if len(varying(whole)) != 1 or not plain:
        return None, "'setitem' of something else than whole channels"
    (dim,) = varying(whole)
    if dim < len(parts) and parts[dim] != slice(None):
        return None, "'setitem' chooses channels by position"
    region = whole[index]
    if not isinstance(value, Tensor):
        return (whole if not value else raised(classes, whole, not_zero(step))), None
    made = together(classes, [region, value.expand(region.shape)], -1, region.shape)
    if made is None:
        return None, "'setitem' of values with different channels"
    (at,) = varying(made)
    return along(line(made, at), dim, whole.shape), None
