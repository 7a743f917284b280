"""Recalibration: BatchNorm statistics measured anew on the cut network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.prune.record import NORMALISING, replica
from netslim.prune.repair.calibration import Calibration


@torch.no_grad()
def recalibrate(network: nn.Module, calibration: Calibration) -> list[str]:
    """Set the running statistics to mean and variance over all calibration images, in place.

    Each chunk is normalised by its own statistics, as in training; where it is one value for each channel, as a single
    image without places, by the running ones.

    Returns: the names of the BatchNorms that met such chunks.
    """
    names = {norm: name for name, norm in network.named_modules()}
    met = []
    for norm, sums in _sums(network, calibration, as_in_training=True).items():
        if not sums[-2]:  # a forward pass does not call it
            continue
        assert norm.running_mean is not None, "measured, so it has them"
        assert norm.running_var is not None, "comes with the mean"
        mean, variance = _statistics(sums)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if sums[-1]:
            met.append(names[norm])
    return met


@torch.no_grad()
def input_statistics(network: nn.Module, calibration: Calibration) -> dict[_BatchNorm, tuple[Tensor, Tensor]]:
    """Measure mean and variance, (channels,) float64, of what goes into each BatchNorm that has statistics.

    Over all images and ranks; the BatchNorms before normalise by the running statistics. What is not called has none.
    """
    sums = _sums(network, calibration, as_in_training=False)
    return {norm: _statistics(part) for norm, part in sums.items() if part[-2]}


def _statistics(sums: Tensor) -> tuple[Tensor, Tensor]:
    mean, square = (sums[:-2] / sums[-2]).view(2, -1)
    return mean, (square - mean * mean).clamp(min=0)


def _sums(network: nn.Module, calibration: Calibration, *, as_in_training: bool) -> dict[_BatchNorm, Tensor]:
    """Add up over chunks and ranks what goes into each BatchNorm: (2 channels + 2,) float64.

    The values, their squares, how many there were for each channel, and the chunks that were a single one.
    """
    twin = replica(network, {}).eval()  # which may be put into training mode, and counts batches there
    norms = {
        name: (norm, twin.get_submodule(name))
        for name, norm in network.named_modules()
        if isinstance(norm, NORMALISING) and norm.running_mean is not None
    }
    sums: dict[nn.Module, Tensor] = {
        of_twin: torch.zeros(2 * norm.num_features + 2, dtype=torch.float64, device=calibration.example.device)
        for norm, of_twin in norms.values()
    }

    def add(norm: nn.Module, inputs: Any) -> None:
        values = inputs[0].transpose(0, 1).flatten(1).double()
        is_single = values.shape[1] == 1  # which has no variance, so that torch refuses it
        norm.training = as_in_training and not is_single
        counts = values.new_tensor([values.shape[1], is_single])
        sums[norm] += torch.cat([values.sum(1), (values * values).sum(1), counts])

    for norm in sums:
        norm.register_forward_pre_hook(add)
    for chunk in calibration.read():
        twin(chunk.images)
    total = calibration.sum_over_ranks(torch.cat(list(sums.values())))
    parts = torch.split(total, [len(part) for part in sums.values()])
    return dict(zip((norm for norm, _ in norms.values()), parts, strict=True))
