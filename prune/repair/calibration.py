"""The images that a repair measures by: the same chunks whatever the number of ranks, and sums over all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HELD_OUT = 8
"""Of this many chunks one is held out, to choose by: nothing is fitted to it."""
FEWEST = 2 * HELD_OUT
"""Images below which a calibration is refused."""
_CHUNK = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A few calibration images, which one rank reads; numbered over all ranks."""

    number: int
    images: Tensor
    labels: Tensor

    @property
    def is_held_out(self) -> bool:
        return self.number % HELD_OUT == HELD_OUT - 1


See = Callable[[Tensor, Tensor, int], None]
"""Sees what goes into a layer and comes out, and the number of the chunk."""


class Show(Protocol):
    def __call__(self, items: Collection[T], what: str) -> Iterable[T]: ...


@dataclass(frozen=True)
class Calibration:
    """Images to measure by, spread over the ranks in chunks that do not depend on how many ranks there are."""

    read: Callable[[], Iterable[Chunk]]
    """Gives this rank's chunks, the same at every call."""
    num_images: int
    """Of all ranks together."""
    example: Tensor
    """Two of them, (2, 3, height, width), the same on every rank."""
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values
    """Adds float64 tensors elementwise; the result is the same on every rank."""
    show: Show = lambda items, what: items
    """Gives the items of a long loop, and may show how far it is: a progress bar."""
    say: Callable[[str], object] = lambda line: warnings.warn(line, stacklevel=2)
    """Is told, on every rank, a line of what is left out of a measure."""

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> Self:
        """Take images (n, 3, height, width) and labels (n,) that are in the memory of one process, on the device."""
        size = chunk_size(len(images))
        pairs = zip(torch.split(images, size), torch.split(labels, size), strict=True)
        chunks = [Chunk(number, *pair) for number, pair in enumerate(pairs)]
        return cls(read=lambda: chunks, num_images=len(images), example=images[:2])


def chunk_size(num_images: int) -> int:
    """Images in a chunk: few enough that some chunks can be held out."""
    return max(1, min(_CHUNK, num_images // FEWEST))


def num_fitted(num_images: int) -> int:
    """Images to which something is fitted, of so many in chunks of `chunk_size`: all but those that are held out."""
    size = chunk_size(num_images)
    starts = range(0, num_images, size)[HELD_OUT - 1 :: HELD_OUT]
    return num_images - sum(min(size, num_images - start) for start in starts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the network into eval mode, and afterwards each of its modules into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def watch(model: nn.Module, calibration: Calibration, layers: Sequence[tuple[nn.Module, See]]) -> None:
    """Run the network, in eval mode, on this rank's chunks; each layer's function sees what passes through it."""
    number = 0

    def hook_of(see: See) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: see(inputs[0], output, number)

    hooks = [layer.register_forward_hook(hook_of(see)) for layer, see in layers]
    try:
        with evaluating(model):
            for chunk in calibration.read():
                number = chunk.number
                model(chunk.images)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def held_out_loss(model: nn.Module, calibration: Calibration) -> tuple[float, int]:
    """Measure the mean cross-entropy over the held-out images of all ranks, in eval mode; and count these images."""
    sums: Tensor | None = None
    with evaluating(model):
        for chunk in calibration.read():
            if chunk.is_held_out:
                loss = F.cross_entropy(model(chunk.images).float(), chunk.labels, reduction="sum").double()
                part = torch.stack([loss, torch.tensor(len(chunk.labels)).to(loss)])
                sums = part if sums is None else sums + part
    device = next(model.parameters()).device
    total, count = calibration.sum_over_ranks(
        torch.zeros(2, dtype=torch.float64, device=device) if sums is None else sums
    ).tolist()
    if not count:
        raise ValueError(f"calibration images come in at least {HELD_OUT} chunks, so that one can be held out")
    return float(total / count), int(count)
