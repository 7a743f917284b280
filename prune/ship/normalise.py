"""The statistics that a network was trained by, as a part of the network: raw pixels in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Brings pixels to what a network was trained on, (x - mean) / std for each channel, and runs it on them.

    Args: mean and std, one for each channel, of pixels in [0, 1]; is_bytes, whether pixels come as uint8 in [0, 255].
    Raises: ValueError if mean and std differ in number, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], *, is_bytes: bool = False):
        super().__init__()
        if len(mean) != len(std) or not all(each > 0 for each in std):
            raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} are no two numbers a channel, std above 0")
        self.network, self.is_bytes = network, is_bytes
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        unit = pixels.to(self.mean.dtype) / 255 if self.is_bytes else pixels
        logits: Tensor = self.network((unit - self.mean) / self.std)
        return logits

    def pixels_of(self, images: Tensor) -> Tensor:
        """Give the pixels that come near to normalised images (n, channels, height, width): those that there are."""
        unit = (images * self.std + self.mean).clamp(0, 1)
        return (unit * 255).round().to(torch.uint8) if self.is_bytes else unit
