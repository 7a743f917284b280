"""Reconstruction: each layer's weights solved anew, so that on what is left it computes what it computed before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from netslim.prune.choose import Plan
from netslim.prune.record import Questions, recorded
from netslim.prune.repair.calibration import Calibration, evaluating
from netslim.prune.repair.foresight import POSITIONS
from netslim.prune.repair.hinge import Hinge, Rows, refine
from netslim.prune.repair.ridge import Moments, solve

ROWS = 1 << 15
"""Samples of all ranks together that are kept in memory, of one layer at a time."""


@torch.no_grad()
def reconstruct(
    model: nn.Module, small: nn.Module, plan: Plan, calibration: Calibration, left: list[str] | None = None
) -> list[str]:
    """Solve the convolutions and linear layers of the cut network anew, in place, in the order of execution.

    Each one's change of weights, and a constant, are fitted by ridge least squares to what its output lacks of the
    output of the same layer of the uncut model, on the input that the network repaired so far gives it (as He et al.
    2017, arXiv 1707.06168, section 3.1, and here over all layers in turn). The ridge of each layer is the one that errs
    least on the held-out chunks; a layer that none helps is left. The constant goes into the layer's bias, or into the
    mean of the BatchNorm that alone reads it. Where a ReLU follows, the fit is refined: what that makes zero in any
    case need not be met (`refine`).

    Layers that a forward pass calls more than once, and transposed convolutions, stay as they are; so do those of
    which more weights stand for each output than the images give samples.

    Args: left, the names of layers that are left out (`left_of`); those that have too few samples all the same join.
    Returns: the names of the layers that were solved.
    Raises: ValueError if activations are not finite.
    """
    left = [] if left is None else left
    asked = Questions(small, recorded(small, calibration.example))
    kept = {part.name: part.outputs for part in plan.slices}
    norms, zeroed, solved = asked.norms_after, asked.rectified, []
    layers = {name: layer for name, layer in asked.called_once.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for number, (name, layer) in enumerate(calibration.show(layers.items(), "reconstructing")):
        if name in left:
            continue
        norm = norms.get(name)
        has_constant = layer.bias is not None or norm is not None
        has_relu = (layer if norm is None else norm) in zeroed
        with evaluating(model):
            seen = _look(model, small, name, kept.get(name), number, calibration, num_rows=ROWS if has_relu else 0)
        check_finite(seen.fit, name)
        if seen.fit.n < seen.fit.x.shape[1]:
            left.append(name)
            continue
        line = solve(seen.fit, seen.held, has_constant=has_constant)
        if line is not None:
            if has_relu:
                systems, targets = seen.fit.y.shape
                hinge = Hinge.of(norm, systems, targets, layer.weight.device)
                rows = (seen.fit_rows, seen.held_rows)
                line = refine(line, *rows, hinge, calibration.sum_over_ranks, has_constant=has_constant)
            layer.weight += line.weight.flatten(0, 1).view_as(layer.weight).to(layer.weight)
            add_constant(layer, norm, line.constant.flatten())
            solved.append(name)
    return solved


def add_constant(layer: nn.Conv2d | nn.Linear, norm: nn.modules.batchnorm._BatchNorm | None, constant: Tensor) -> bool:
    """Add to a layer's output, (outputs,), in its bias, or the mean of the BatchNorm after it; False if it has none."""
    if layer.bias is not None:
        layer.bias += constant.to(layer.bias)
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean -= constant.to(norm.running_mean)
    else:
        return False
    return True


@dataclass
class _Seen:
    """A layer's inputs and what its outputs lack: moments over all ranks, and some samples of this one."""

    fit: Moments
    held: Moments
    fit_rows: list[Rows]
    held_rows: list[Rows]


def _look(
    model: nn.Module,
    small: nn.Module,
    name: str,
    kept: tuple[int, ...] | None,
    number: int,
    calibration: Calibration,
    num_rows: int,
) -> _Seen:
    """Run both networks over the calibration images, up to one layer of theirs."""
    layer, old = small.get_submodule(name), model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear), "asked before"
    dim = -1 if isinstance(layer, nn.Linear) else 1
    indices = None if kept is None else torch.tensor(kept, device=layer.weight.device)
    systems = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.weight
    fit, held = (Moments.none(systems, weight[0].numel(), len(weight) // systems, weight.device) for _ in range(2))
    fit_rows: list[Rows] = []
    held_rows: list[Rows] = []
    with _up_to(small, layer) as inputs_of, _up_to(model, old) as old_inputs_of:
        for chunk in calibration.read():
            inputs, original = inputs_of(chunk.images), old.forward(old_inputs_of(chunk.images))
            if indices is not None:
                original = original.index_select(dim, indices)
            seed = (number << 32) + chunk.number
            x, target, output = samples_of(layer, inputs, (original, layer.forward(inputs)), seed)
            (held if chunk.is_held_out else fit).add(x, target - output)
            most = num_rows * len(chunk.images) // calibration.num_images
            if most:
                every = slice(None, None, -(-x.shape[1] // most))
                rows = Rows(*(part[:, every].clone() for part in (x, output, target)))
                (held_rows if chunk.is_held_out else fit_rows).append(rows)
    fit = fit.over(calibration.sum_over_ranks)  # one after the other: they may be the largest that is in memory
    held = held.over(calibration.sum_over_ranks)
    return _Seen(fit, held, fit_rows, held_rows)


def check_finite(moments: Moments, name: str) -> None:
    """Raise ValueError where what goes into a layer, or comes out, was not finite."""
    if not moments.is_finite():
        raise not_finite(name)


def not_finite(name: str) -> ValueError:
    return ValueError(
        f"the activations at '{name}' are NaN or infinite, so its weights cannot be solved: the sparse model "
        "diverged, or its file is damaged"
    )


def samples_of(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Sequence[Tensor], seed: int
) -> tuple[Tensor, ...]:
    """Features (groups, samples, features) and outputs (groups, samples, outputs), at some places of the output."""
    if isinstance(layer, nn.Linear):
        return tuple(values.flatten(0, -2)[None] for values in (inputs, *outputs))
    width = outputs[0].shape[3]
    places = torch.arange(outputs[0].shape[2] * width)
    if len(places) > POSITIONS:
        places = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:POSITIONS]
    places = places.to(inputs.device)
    corners = (places // width, places % width)
    rows, columns = (
        corner[:, None] * stride + torch.arange(size, device=inputs.device) * dilation
        for corner, stride, size, dilation in zip(corners, layer.stride, layer.kernel_size, layer.dilation, strict=True)
    )
    # (n, channels, places, height, width), by groups
    patches = _padded(layer, inputs)[:, :, rows[:, :, None], columns[:, None, :]]
    x = patches.view(len(patches), layer.groups, -1, *patches.shape[2:])
    y = (values.flatten(2)[:, :, places].view(len(x), layer.groups, -1, len(places)) for values in outputs)
    return x.permute(1, 0, 3, 2, 4, 5).flatten(3).flatten(1, 2), *(part.permute(1, 0, 3, 2).flatten(1, 2) for part in y)


def _padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)


class _Arrived(Exception):  # noqa: N818  # not an error: the rest of the forward pass is not needed
    pass


@contextmanager
def _up_to(network: nn.Module, layer: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function that runs the network on images as far as the layer, and returns what goes into it."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Arrived

    def run(images: Tensor) -> Tensor:
        with suppress(_Arrived):
            network(images)
        return found.pop()

    hook: RemovableHandle = layer.register_forward_pre_hook(stop)
    try:
        yield run
    finally:
        hook.remove()
