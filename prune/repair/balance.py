"""Balance: the same function, with weights of the sizes that training expects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.prune.record import NORMALISING, Questions, recorded
from netslim.prune.repair.calibration import Calibration
from netslim.prune.repair.recalibration import input_statistics

GAMMA = 0.5
"""Root mean square of a layer's gammas: what slimming begins with (Liu et al. 2017, section 4.2)."""


@torch.no_grad()
def balance(network: nn.Module, calibration: Calibration) -> None:
    """Change weights, gammas, betas and statistics together, in place: no output changes, but training can begin.

    Sparsity training leaves small gammas, for which least squares makes up by large weights further on: training steps
    of the usual size would undo what was repaired. In the order of execution, statistics become those of the
    calibration images, so that training begins with the same function too. Filters that a BatchNorm follows become as
    large as new ones (He et al. 2015, arXiv 1502.01852, by fan-out). Gammas become as large as new ones where a
    BatchNorm also follows the layers that read them; where none does, as behind the last one, gammas and the weights
    that read them become equally large, which is what weight decay tends to.

    Scales go past ReLUs, pooling and flattening, not past sums or other activations; what they cannot reach stays.
    """
    asked = Questions(network, recorded(network, calibration.example))
    once, readers = asked.called_once, asked.readers_of_norms
    layer_of = {
        norm: layer
        for name, norm in asked.norms_after.items()
        if norm.affine and isinstance(layer := once[name], nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    }
    normalised = set(layer_of.values())
    statistics = input_statistics(network, calibration)
    for norm in once.values():
        if norm in statistics and isinstance(norm, NORMALISING) and norm.affine:
            _rebase(norm, *statistics[norm], layer_of.get(norm))
            _spread(norm, readers.get(norm, ()), normalised)


def _rebase(norm: _BatchNorm, mean: Tensor, variance: Tensor, layer: Any) -> None:
    """Let a BatchNorm normalise by these statistics, (channels,) float64, of its input; its layer gets new sizes."""
    assert norm.running_mean is not None, "it has statistics"
    assert norm.running_var is not None, "comes with the mean"
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() + gain * (mean - norm.running_mean.double())
    if layer is not None:
        filters = layer.weight.flatten(1).double()
        groups = getattr(layer, "groups", 1)
        size = math.sqrt(2 * groups / (len(filters) * layer.weight[0, 0].numel()) * filters.shape[1])
        sizes = filters.norm(dim=1)
        factors = torch.where(sizes > 0, size / sizes, 1.0)
        layer.weight *= factors.view(-1, *(1,) * (layer.weight.dim() - 1)).to(layer.weight)
        if layer.bias is not None:
            layer.bias *= factors.to(layer.bias)
        mean, variance, gain = mean * factors, variance * factors**2, gain / factors
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(gain * (variance + norm.eps).sqrt())
    norm.bias.copy_(shift)


def _spread(norm: _BatchNorm, readers: Sequence[Any], normalised: set[Any]) -> None:
    """Scale what a BatchNorm gives, and the layers that read it by the inverse."""
    size = float(norm.weight.double().norm())
    if not readers or not size:
        return
    factor = GAMMA * math.sqrt(norm.num_features) / size
    if not normalised.issuperset(readers):
        squares = [float(each.weight.double().square().sum()) for each in readers if each not in normalised]
        factor = math.sqrt(math.sqrt(sum(squares)) / size) or 1.0
    norm.weight.mul_(factor)
    norm.bias.mul_(factor)
    for each in readers:
        each.weight /= factor
