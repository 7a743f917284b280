"""Recalibration: BatchNorm statistics measured anew on the cut network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.prune.record import NORMALISING, replica
from netslim.prune.repair.calibration import Calibration


@torch.no_grad()
def recalibrate(network: nn.Module, calibration: Calibration) -> None:
    """Set the running statistics to mean and variance over all calibration images, in place.

    Each chunk is normalised by its own statistics, as in training.
    """
    for norm, (mean, variance) in input_statistics(network, calibration, as_in_training=True).items():
        assert norm.running_mean is not None, "measured, so it has them"
        assert norm.running_var is not None, "comes with the mean"
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


@torch.no_grad()
def input_statistics(
    network: nn.Module, calibration: Calibration, *, as_in_training: bool
) -> dict[_BatchNorm, tuple[Tensor, Tensor]]:
    """Measure mean and variance, (channels,) float64, of what goes into each BatchNorm that has statistics.

    Over all images and ranks; first and second moments are summed over chunks. The BatchNorms before normalise by the
    running statistics, or `as_in_training` by those of each chunk.
    """
    twin = replica(network, {}).eval()  # which may be put into training mode, and counts batches there
    norms = {
        name: (norm, twin.get_submodule(name).train(as_in_training))
        for name, norm in network.named_modules()
        if isinstance(norm, NORMALISING) and norm.running_mean is not None
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
    total = calibration.sum_over_ranks(torch.cat(list(sums.values())))
    found = {}
    parts = torch.split(total, [len(part) for part in sums.values()])
    for (norm, _), part in zip(norms.values(), parts, strict=True):
        mean, square = (part[:-1] / part[-1]).view(2, -1)
        found[norm] = (mean, (square - mean * mean).clamp(min=0))
    return found
