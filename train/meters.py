"""What an epoch costs besides computing: waiting for images, and memory of the GPU. Neither makes a step wait."""

import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Waits(Generic[T]):
    """Items, and for how long the loop over them waited for the next one: of this process, on the CPU's clock."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        while True:
            started = time.perf_counter()
            try:
                item = next(self._items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item

    def share(self, seconds: float) -> float:
        """What part of ``seconds`` the waiting was, in [0, 1]."""
        return min(1.0, self.seconds / seconds) if seconds > 0 else 0.0


def forget_peak_memory(device: torch.device) -> None:
    """Begin to look for the peak anew; on the CPU there is none."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most that tensors took of the GPU at once, in 10^6 bytes, as ``gpu_memory_mb``; nothing on the CPU."""
    return {"gpu_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6} if device.type == "cuda" else {}
