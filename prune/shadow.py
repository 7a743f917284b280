"""A copy of a network without its numbers, for everything that asks only for shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from netslim.prune.replica import replica

Result = TypeVar("Result")


def weightless(model: nn.Module) -> nn.Module:
    """Copy the network, in eval mode, onto the meta device, where shapes cost no arithmetic."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return replica(model, memo).eval()


def on_a_copy(model: nn.Module, example: Tensor, ask: Callable[[nn.Module, Tensor], Result]) -> Result:
    """Ask a copy of the network in eval mode, one without numbers if that suffices.

    Networks that read values while they run (`.item()`, tensors made on a fixed device) need a copy with their numbers.
    """
    with torch.no_grad():
        try:
            return ask(weightless(model), example.detach().to("meta"))
        except Exception:  # whatever it was: the copy with numbers decides, and its error is the user's
            return ask(replica(model, {}).eval(), example.detach())
