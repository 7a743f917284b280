"""All images of a split, decoded ahead by threads, and the mean and deviation of their colours."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from netslim.data.sources import Split
from netslim.data.store.info import Triple

Sums = NDArray[np.int64]  # (2, 3): per channel the sum of the values and of their squares, then pixels by shape
_CHUNK = 32  # images per task: a task each would cost more than decoding a small image


class Statistics:
    """Mean and standard deviation per channel, from exact integer sums: the same in any order."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, 3), dtype=np.int64)

    def add(self, sums: Sums) -> None:
        """Adds one image's sums, as `decoded` gives them."""
        self._sums += sums

    def mean_std(self) -> tuple[Triple, Triple]:
        """In [0, 1]; the deviation is at least a grey level, so that one may divide by it."""
        total, squares, count = (self._sums[i].astype(np.float64) for i in range(3))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
        first, second = (tuple(float(x) / 255 for x in values) for values in (mean, std))
        return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def channel_sums(image: NDArray[np.uint8]) -> Sums:
    """`(3, 3)`: sums, sums of squares and number of pixels, per channel of `(height, width, 3)`."""
    pixels = image.reshape(-1, 3).astype(np.float64)  # float64 is exact here and, unlike int64, has fast products
    ones = np.full(3, len(pixels))
    return np.stack([pixels.sum(axis=0), np.einsum("ij,ij->j", pixels, pixels), ones]).astype(np.int64)


def decoded(split: Split, *, with_sums: bool) -> Iterator[tuple[NDArray[np.uint8], int, Sums]]:
    """Image, label and colour sums (zeros without `with_sums`) in order; the first error ends it."""
    nothing = np.zeros((3, 3), dtype=np.int64)

    def decode(start: int) -> list[tuple[NDArray[np.uint8], int, Sums]]:
        pairs = (split[i] for i in range(start, min(start + _CHUNK, len(split))))
        return [(image, label, channel_sums(image) if with_sums else nothing) for image, label in pairs]

    workers = min(16, len(os.sched_getaffinity(0)))
    starts = iter(range(0, len(split), _CHUNK))
    with ThreadPoolExecutor(workers) as pool:
        # A window, not everything: decoded images would fill the memory faster than a disk takes them.
        window: deque[Future[list[tuple[NDArray[np.uint8], int, Sums]]]] = deque()
        window.extend(pool.submit(decode, start) for start in islice(starts, 2 * workers))
        try:
            while window:
                done = window.popleft().result()
                window.extend(pool.submit(decode, start) for start in islice(starts, 1))
                yield from done
        finally:
            pool.shutdown(cancel_futures=True)
