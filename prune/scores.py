"""What a channel is worth to the network: its |gamma|, alone or with what is done with the channel, or its loss."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from netslim.prune.choose import Rules
from netslim.prune.map import ChannelMap, Ends, Ints
from netslim.prune.record import CONVOLVING, NORMALISING, tensor_of, weight_of
from netslim.prune.repair import Calibration, elimination_scores

Norms = NDArray[np.float64]


def score_channels(
    model: nn.Module, channels: ChannelMap, rules: Rules, calibration: Calibration | None = None
) -> dict[str, Tensor]:
    """Score every gamma of the BatchNorms that have a removable one, (width,) each.

    By |gamma|, by |gamma| times the norm of the weights that read the channel (`reading_norms`), or, by calibration
    images, by what is lost for good without it (`elimination_scores`; then every rank has to call this).

    Raises: ValueError if the score needs calibration images and there are none.
    """
    if rules.score == "reconstruction":
        if calibration is None:
            raise ValueError("score reconstruction measures on images; give a calibration, or score by gamma")
        return elimination_scores(model, channels, rules.coupling, calibration)
    gammas = {name: gamma.detach() for name, gamma in channels.named_gammas(model, rules.coupling).items()}
    if rules.score == "gamma":
        return gammas
    norms = reading_norms(model, channels)
    return {name: gamma.double().abs().cpu() * norms[name] for name, gamma in gammas.items()}


def reading_norms(model: nn.Module, channels: ChannelMap) -> dict[str, Tensor]:
    """Give per BatchNorm and channel, (width,) float64, the Euclidean norm of all weights that read the channel next.

    Convolutions and linear layers count with their weights. A BatchNorm or a depthwise convolution hands a channel on:
    it counts with what it multiplies the channel by, times the norm of what reads the result. A channel that none of
    these reads counts as one that is read once by a weight of 1. Channels that the network binds to one another, such
    as those of equal place in the groups of a convolution, are read as one.
    """
    norms = {layer.name for layer in channels.layers}
    reading: Norms = np.zeros(len(channels.fixed))  # per channel of the map, the sum of squares so far
    found = {}
    for end in reversed(channels.modules):  # what reads a channel runs after what makes it
        inputs, outputs = np.asarray(end.inputs), np.asarray(end.outputs)
        if end.name in norms:
            after = reading[outputs]
            found[end.name] = torch.from_numpy(np.sqrt(np.where(after > 0, after, 1.0)))
            reading += _mean_by_number(inputs, _gains(model, end) ** 2 * after, len(reading))
        elif _hands_on(model, end):
            reading[inputs] *= _mean_by_number(inputs, _column_norms(model, end), len(reading))[inputs]
        else:
            np.add.at(reading, inputs, _column_norms(model, end))
    return found


def _mean_by_number(numbers: Ints, values: Norms, count: int) -> Norms:
    """Average the values of each number, (count,); 0 where there is none."""
    sums = np.bincount(numbers, values, count).astype(np.float64)
    return sums / np.maximum(np.bincount(numbers, minlength=count), 1)


def _gains(model: nn.Module, end: Ends) -> Norms:
    gamma = weight_of(model, end.name)
    gains = torch.ones(len(end.outputs), dtype=torch.float64) if gamma is None else gamma.detach().double().cpu()
    norm = model.get_submodule(end.name) if tensor_of(model, end.name) is None else None
    if isinstance(norm, NORMALISING) and norm.running_var is not None:
        gains = gains / (norm.running_var.double().cpu() + norm.eps).sqrt()
    values: Norms = gains.numpy()
    return values


def _hands_on(model: nn.Module, end: Ends) -> bool:
    """Tell whether each channel goes through a depthwise layer by itself."""
    return len(end.inputs) > 1 and _groups(model, end) == len(end.inputs)


def _groups(model: nn.Module, end: Ends) -> int:
    weight, layer = _weight(model, end)
    if isinstance(layer, CONVOLVING):
        return layer.groups
    return len(end.inputs) // weight.shape[1] if weight.dim() > 2 else 1


def _column_norms(model: nn.Module, end: Ends) -> Norms:
    """Sum the squares of the weights that read each input, (inputs,)."""
    weight, layer = _weight(model, end)
    weight, groups = weight.detach().double().square().cpu(), _groups(model, end)
    if isinstance(layer, CONVOLVING) and layer.transposed:
        sums = weight.flatten(1).sum(1)  # (in, out / groups, ...)
    elif weight.dim() == 2:
        sums = weight.sum(0)  # (out, in)
    else:
        sums = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(2).sum(2).flatten()
    values: Norms = sums.numpy()
    return values


def _weight(model: nn.Module, end: Ends) -> tuple[Tensor, nn.Module | None]:
    """Find the weight of a convolution or linear layer, and its module if it has one."""
    weight = weight_of(model, end.name)
    assert weight is not None, "a layer of the map"
    return weight, None if tensor_of(model, end.name) is weight else model.get_submodule(end.name)
