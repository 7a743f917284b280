"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from netslim.prune.record import Example, arguments, call, on_a_copy, tensors_of


@dataclass(frozen=True)
class Cost:
    """Parameters (without buffers) and multiply-accumulates per image."""

    params: int
    macs: int


def cost(model: nn.Module, example: Example) -> Cost:
    """Count a network's parameters and, in eval mode, its multiply-accumulates per image; the model is unchanged.

    Convolutions and matrix products count; biases, BatchNorm and activations do not, as in the papers' tables.

    Args: example, as the network is called: images (n, 3, height, width), or arguments of which the first holds the
    images; on the model's device and in its dtype.
    """
    flops = on_a_copy(model, example, _flops)
    return Cost(params=sum(p.numel() for p in model.parameters()), macs=flops // 2 // _num_images(example))


def _num_images(example: Example) -> int:
    """Count the images of an example: a batch of them, or a list of single ones."""
    args, kwargs = arguments(example)
    first = next(iter((*args, *kwargs.values())))
    if isinstance(first, (list, tuple)):
        return max(1, len(first))
    return max(1, len(tensors_of(first)[0]))


def _flops(model: nn.Module, example: Example) -> int:
    with FlopCounterMode(display=False) as counter:
        call(model, example)
    return int(counter.get_total_flops())
