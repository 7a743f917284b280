"""The two layers that a cut may need: a selection before a BatchNorm, and zeros put back after one."""

# Without `from __future__ import annotations`: torch.jit.script reads these annotations as types.
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def chosen(x: Tensor, indices: Tensor) -> Tensor:
    """Select channels of x (n, channels, ...); images whose channels lie last in memory stay so."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).index_select(3, indices).permute(0, 3, 1, 2)
    return x.index_select(1, indices)


class SelectChannels(nn.Module):
    """Passes on the channels of the given indices: (n, channels, ...) -> (n, len(indices), ...).

    The indices belong to the plan, so they are in no state dict.
    """

    indices: Tensor

    def __init__(self, indices: Sequence[int], device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(indices, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return chosen(x, self.indices)

    def extra_repr(self) -> str:
        return f"{len(self.indices)} channels"


class ScatterChannels(nn.Module):
    """Puts channels at the given indices among zeros: (n, len(indices), ...) -> (n, width, ...)."""

    sources: Tensor

    def __init__(self, indices: Sequence[int], width: int, device: torch.device | None = None) -> None:
        super().__init__()
        sources = [len(indices)] * width  # one channel of zeros stands behind the others
        for source, index in enumerate(indices):
            sources[index] = source
        self.register_buffer("sources", torch.tensor(sources, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return chosen(torch.cat([x, torch.zeros_like(x[:, :1])], 1), self.sources)

    def extra_repr(self) -> str:
        return f"to {len(self.sources)} channels"
