"""Recalibration: BatchNorm statistics measured anew on the cut network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from netslim.prune import operations as ops
from netslim.prune.calibration import Calibration


@torch.no_grad()
def recalibrate(network: nn.Module, calibration: Calibration) -> None:
    """Set the running statistics to mean and variance over all calibration images, in place.

    Each chunk is normalised by its own statistics, as in training; first and second moments are summed in float64 over
    chunks and ranks.
    """
    twin = copy.deepcopy(network).eval()  # which is put into training mode, and counts batches there
    norms = {
        name: (norm, twin.get_submodule(name).train())
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
    total = calibration.sum_over_ranks(torch.cat(list(sums.values())))
    parts = torch.split(total, [len(part) for part in sums.values()])
    for (norm, _), part in zip(norms.values(), parts, strict=True):
        mean, square = (part[:-1] / part[-1]).view(2, -1)
        assert norm.running_mean is not None, "asked before"
        assert norm.running_var is not None, "comes with the mean"
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean * mean).clamp(min=0))
