"""One layer, cut: whether it fits its slice, its tensors, its sizes, and the selection around it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from netslim.prune.choose import Plan, Selection, Slice, Trim
from netslim.prune.cut.select import ScatterChannels, SelectChannels
from netslim.prune.record import CONVOLVING, INSTANCE_NORMALISING, NORMALISING, WEIGHTED, tensor_of, weight_of, widths

OWN = ("weight", "bias", "running_mean", "running_var")
"""What a slice resizes of a layer, by the names that torch's own layers use."""


def fitting_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Find the layers of the plan's slices that are modules; ValueError if it was not made for this model."""
    modules, layers = dict(model.named_modules()), {}
    for kept in plan.layers:
        norm, gamma = modules.get(kept.name), weight_of(model, kept.name)
        have = widths(norm)[1] if isinstance(norm, NORMALISING) else 0 if gamma is None else len(gamma)
        if not have:
            raise ValueError(f"the plan does not fit the network: it has no BatchNorm '{kept.name}'")
        _check_width(kept.name, "channels", have, kept.width)
    for trim in plan.trims:
        tensor = tensor_of(model, trim.name)
        if tensor is None and isinstance(modules.get(trim.name), INSTANCE_NORMALISING):
            continue
        if tensor is None or tensor.dim() <= trim.dim:
            raise ValueError(f"the plan does not fit the network: it has no parameter or buffer '{trim.name}'")
        _check_width(trim.name, f"elements along dimension {trim.dim}", tensor.shape[trim.dim], trim.size)
    for part in plan.slices:
        layer = modules.get(part.name)
        if layer is None and part.name in plan.kept:
            continue  # a BatchNorm whose tensors are trimmed one by one
        if layer is None or not (isinstance(layer, WEIGHTED) or part.name in plan.kept):
            raise ValueError(f"the plan does not fit the network: it has no convolution or linear layer '{part.name}'")
        layers[part.name] = layer
        num_inputs, num_outputs = widths(layer)
        _check_width(part.name, "inputs", num_inputs, part.num_inputs)
        _check_width(part.name, "outputs", num_outputs, part.num_outputs)
        if isinstance(layer, CONVOLVING) and layer.groups > 1:
            _check_groups(layer, part)
    return layers


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Name what a slice resizes of a layer."""
    own = dict((*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)))
    return {name: tensor for name, tensor in own.items() if name in OWN}


def _check_groups(layer: nn.Module, part: Slice) -> None:
    """Refuse a plan after which the groups of a convolution would not be equal."""
    assert isinstance(layer, CONVOLVING), "asked before"
    deep = layer.groups == layer.in_channels
    kept_inputs = range(part.num_inputs) if part.inputs is None else part.inputs
    kept_outputs = range(part.num_outputs) if part.outputs is None else part.outputs
    per_input, per_output = part.num_inputs // layer.groups, part.num_outputs // layer.groups
    if deep:
        alike = [i for i in kept_inputs for _ in range(per_output)] == [o // per_output for o in kept_outputs]
    else:
        alike = _alike(kept_inputs, per_input, layer.groups) and _alike(kept_outputs, per_output, layer.groups)
    if not alike:
        raise ValueError(f"the plan does not fit the network: it leaves unequal groups in '{part.name}'")


def _alike(kept: Sequence[int], width: int, groups: int) -> bool:
    first = [index for index in kept if index < width]
    return list(kept) == [group * width + index for group in range(groups) for index in first]


def _check_width(name: str, what: str, have: int, want: int) -> None:
    if have != want:
        raise ValueError(f"the plan does not fit the network: '{name}' has {have} {what}, the plan says {want}")


def resize(layer: nn.Module, part: Slice) -> None:
    """Let a layer say its new sizes."""
    num_inputs = part.num_inputs if part.inputs is None else len(part.inputs)
    num_outputs = part.num_outputs if part.outputs is None else len(part.outputs)
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = num_inputs, num_outputs
    elif isinstance(layer, CONVOLVING):
        if layer.groups > 1 and layer.groups == layer.in_channels:
            layer.groups = num_inputs
        layer.in_channels, layer.out_channels = num_inputs, num_outputs
    elif hasattr(layer, "num_features"):
        layer.num_features = num_outputs  # type: ignore[assignment]  # of a class of the user's own


def retell(small: nn.Module, trim: Trim) -> None:
    """Let a module of torch's that is no layer say its new size, if it has one of the trimmed tensor's."""
    told = tensor_of(small, trim.name) is None
    module = small.get_submodule(trim.name if told else trim.name.rpartition(".")[0])
    if isinstance(module, INSTANCE_NORMALISING):
        module.num_features = len(trim.kept)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(trim.kept)


def trimmed(tensor: Tensor, trim: Trim) -> Tensor:
    """Take the kept elements along one dimension."""
    values = _laid_out_like(tensor, tensor.detach().index_select(trim.dim, _index(trim.kept, tensor.device)))
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def surround(small: nn.Module, around: Selection) -> None:
    """Put a selection before a BatchNorm, or zeros among its results, wherever the network holds it."""
    norm = small.get_submodule(around.name)
    device = next(norm.parameters()).device
    parts: dict[str, nn.Module] = {"norm": norm}
    if around.before is not None:
        parts = {"select": SelectChannels(around.before, device), **parts}
    if around.after is not None:
        parts["scatter"] = ScatterChannels(around.after, around.num_after, device)
    sequence = nn.Sequential(OrderedDict(parts)).train(norm.training)
    for parent in [*small.modules()]:
        for name, child in [*parent.named_children()]:
            if child is norm:
                setattr(parent, name, sequence)


def put_back(tensor: Tensor, trims: Sequence[Trim], values: Tensor) -> None:
    """Put the values of a trimmed tensor where they were taken from, in place."""
    places = [torch.arange(size, device=tensor.device) for size in tensor.shape]
    for trim in trims:
        places[trim.dim] = _index(trim.kept, tensor.device)
    tensor[torch.meshgrid(*places, indexing="ij")] = values


def scatter(layer: nn.Module, name: str, tensor: Tensor, part: Slice | None, values: Tensor) -> None:
    """Put the values of a sliced tensor where `sliced` takes them from, in place; all of it where there is no slice."""
    if part is None or not tensor.dim():
        tensor.copy_(values)
        return
    kept = _kept(layer, name, tensor, part)
    places = [
        torch.arange(size, device=tensor.device) if index is None else index
        for index, size in zip(kept, tensor.shape, strict=False)
    ]
    tensor[torch.meshgrid(*places, indexing="ij")] = values


def sliced(layer: nn.Module, name: str, tensor: Tensor, part: Slice) -> Tensor:
    """Take the kept features of a weight (out, in / groups, ...), transposed (in, out, ...), or of a vector (out,)."""
    values = _laid_out_like(tensor, _selected(tensor.detach(), *_kept(layer, name, tensor, part)))
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _kept(layer: nn.Module, name: str, tensor: Tensor, part: Slice) -> tuple[Tensor | None, Tensor | None]:
    """Indices that stay along the first two dimensions of a layer's tensor; None = all."""
    outputs = None if part.outputs is None else _index(part.outputs, tensor.device)
    inputs = None
    if part.inputs is not None and tensor.dim() > 1:
        kept = _of_one_group(layer, part.inputs) if isinstance(layer, CONVOLVING) else part.inputs
        inputs = _index(kept, tensor.device)
    swapped = name == "weight" and tensor.dim() > 1 and isinstance(layer, CONVOLVING) and layer.transposed
    return (inputs, outputs) if swapped else (outputs, inputs)


def _selected(values: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Select along the first two dimensions; None = all."""
    if rows is not None and columns is not None and values.is_contiguous() and values[0, 0].numel() > 1:
        # kernels at once: half the memory to fill, and of large weights that is what takes the time
        both = (rows[:, None] * values.shape[1] + columns).flatten()
        return values.flatten(0, 1).index_select(0, both).view(len(rows), len(columns), *values.shape[2:])
    values = values if rows is None else values.index_select(0, rows)
    return values if columns is None else values.index_select(1, columns)


@lru_cache(maxsize=4)  # the tensors of a layer are sliced one after the other
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, device=device)


def _of_one_group(layer: nn.Module, inputs: tuple[int, ...]) -> tuple[int, ...]:
    """Give the kept inputs of a convolution's first group: all groups keep the same."""
    assert isinstance(layer, CONVOLVING), "asked before"
    width = layer.in_channels // layer.groups
    return inputs if layer.groups == 1 else tuple(index for index in inputs if index < width) if width > 1 else (0,)


def _laid_out_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Copy values into memory in the order of the tensor's dimensions there: index_select forgets channels_last."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)  # stable, also in reverse
    if order == list(range(tensor.dim())) and values.is_contiguous() and values.data_ptr() != tensor.data_ptr():
        return values  # a copy already
    empty = torch.empty_permuted(values.shape, order, dtype=values.dtype, device=values.device)
    return empty.copy_(values)
