"""The two layers that a cut may need: a selection before a BatchNorm, and zeros put back after one."""

# Without `from __future__ import annotations`: torch.jit.script reads these annotations as types.
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SelectChannels(nn.Module):
    """Passes on the channels of the given indices: (n, channels, ...) -> (n, len(indices), ...).

    The indices belong to the plan, so they are in no state dict.
    """

    indices: Tensor

    def __init__(self, indices: Sequence[int], device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(indices, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.indices)

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
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1).index_select(1, self.sources)

    def extra_repr(self) -> str:
        return f"to {len(self.sources)} channels"
