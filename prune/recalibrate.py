"""Recalibration: BatchNorm statistics measured anew on the cut network, for another output or for the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.prune import operations as ops
from netslim.prune.calibration import Calibration


@torch.no_grad()
def recalibrate(network: nn.Module, calibration: Calibration) -> None:
    """Set the running statistics to mean and variance over all calibration images, in place.

    Each chunk is normalised by its own statistics, as in training; first and second moments are summed in float64 over
    chunks and ranks.
    """
    for norm, mean, variance in _measured(network, calibration, as_in_training=True):
        _set_statistics(norm, mean, variance)


@torch.no_grad()
def rebase(network: nn.Module, calibration: Calibration) -> None:
    """Set the running statistics to those of the calibration images, and gamma and beta so that no output changes.

    Least squares gives outputs of less variance than those that the statistics were taken of. Training divides by
    the variance of its batches: it would begin with another function than the one that was repaired.
    """
    for norm, mean, variance in _measured(network, calibration, as_in_training=False):
        if not norm.affine:
            continue
        assert norm.running_mean is not None, "measured, so it has them"
        assert norm.running_var is not None, "comes with the mean"
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        gain = norm.weight.double() / deviation
        shift = norm.bias.double() + gain * (mean - norm.running_mean.double())
        _set_statistics(norm, mean, variance)
        norm.weight.copy_(gain * (norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(shift)


def _set_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None, "measured, so it has them"
    assert norm.running_var is not None, "comes with the mean"
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _measured(
    network: nn.Module, calibration: Calibration, *, as_in_training: bool
) -> list[tuple[_BatchNorm, Tensor, Tensor]]:
    """Mean and variance, (channels,) float64, of what goes into each BatchNorm, over all images and ranks."""
    twin = copy.deepcopy(network).eval()  # in training mode BatchNorms count batches
    norms = {
        name: (norm, twin.get_submodule(name).train(as_in_training))
        for name, norm in network.named_modules()
        if isinstance(norm, ops.NORMALISING) and norm.running_mean is not None
    }
    sums: dict[nn.Module, Tensor] = {
        of_twin: torch.zeros(2 * norm.num_features + 1, dtype=torch.float64, device=calibration.example.device)
        for norm, of_twin in norms.values()
    }

    def add(norm: nn.Module, inputs: Any) -> None:
        values = inputs[0].transpose(0, 1).flatten(1).double()
        count = values.new_full((1,), values.shape[1])
        sums[norm] += torch.cat([values.sum(1), (values * values).sum(1), count])

    for norm in sums:
        norm.register_forward_pre_hook(add)
    for chunk in calibration.read():
        twin(chunk.images)
    if not sums:
        return []
    total = calibration.sum_over_ranks(torch.cat(list(sums.values())))
    parts = torch.split(total, [len(part) for part in sums.values()])
    found = []
    for (norm, _), part in zip(norms.values(), parts, strict=True):
        mean, square = (part[:-1] / part[-1]).view(2, -1)
        found.append((norm, mean, (square - mean * mean).clamp(min=0)))
    return found
