"""How long a network takes: the median over many calls, in milliseconds."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_WARM_UP, _RUNS = 1, 3  # at least, however slow the network


def latency(
    model: nn.Module, example: Tensor, batch_sizes: Sequence[int] = (1, 64), seconds: float = 1.0
) -> dict[int, float]:
    """Measure the median time of a call for each batch size, in milliseconds; the model is unchanged.

    In eval mode without autograd, on the example's device, after a warm-up.

    Args: example (n, 3, height, width), whose first image fills every batch; seconds to repeat for, per batch size.
    """
    twin = copy.deepcopy(model).to(example.device).eval()
    with torch.inference_mode():
        return {size: _median(twin, torch.cat([example[:1]] * size), seconds) for size in batch_sizes}


def _median(model: nn.Module, images: Tensor, seconds: float) -> float:
    call = _call_on_gpu if images.is_cuda else _call
    _repeat(lambda: call(model, images), seconds / 4, _WARM_UP)
    return statistics.median(_repeat(lambda: call(model, images), seconds, _RUNS))


def _repeat(measure: Callable[[], float], seconds: float, at_least: int) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < end:
        times.append(measure())
    return times


def _call(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return (time.perf_counter() - start) * 1e3


def _call_on_gpu(model: nn.Module, images: Tensor) -> float:
    """Between two events: a call returns before the GPU has done its work."""
    with torch.cuda.device(images.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        model(images)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
