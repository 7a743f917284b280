"""All images of a split, decoded ahead by threads, and the mean and deviation of their colours."""

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from netslim.data.pixels import Seen, UnreadableError, hush
from netslim.data.splits import Split
from netslim.data.store.info import Triple

Sums = NDArray[np.int64]  # (2, 3): per channel the sum of the values and of their squares, then pixels by shape
S = TypeVar("S")
T = TypeVar("T")
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


@dataclass(frozen=True)
class Decoded:
    """An image of a split `(size, size, 3)` uint8, and what is known of it."""

    image: NDArray[np.uint8]
    label: int
    sums: Sums  # zeros unless they were asked for
    seen: Seen


def decoded(split: Split, *, with_sums: bool) -> Generator[Decoded]:
    """All images of a split in order; to be closed by who leaves it before its end.

    Where one cannot be read the rest are only tried, and UnreadableError then names all of them that cannot.
    """
    nothing = np.zeros((3, 3), dtype=np.int64)

    def decode(index: int) -> Decoded:
        image, label, seen = split.read(index)
        return Decoded(image, label, channel_sums(image) if with_sums else nothing, seen)

    files: list[tuple[str, str]] = []
    with closing(in_threads(decode, range(len(split)))) as results:
        for found in results:
            if isinstance(found, UnreadableError):
                files += found.files
            elif not files:
                yield found
    if files:
        raise UnreadableError(files, len(split))


def in_threads(function: Callable[[S], T], items: Sequence[S]) -> Generator[T | UnreadableError]:
    """What a function gives of each item, in order and ahead of who reads it; unreadable files as values.

    To be closed by who leaves it before its end: the garbage collector may do so in one of the threads, which cannot
    wait for themselves.
    """

    def call(item: S) -> T | UnreadableError:
        try:
            return function(item)
        except UnreadableError as error:
            return error.with_traceback(None)  # which would hold on to the file's content

    def work(start: int) -> list[T | UnreadableError]:
        return [call(item) for item in items[start : start + _CHUNK]]

    workers = min(16, len(os.sched_getaffinity(0)))
    starts = iter(range(0, len(items), _CHUNK))
    with hush, ThreadPoolExecutor(workers) as pool:
        # A window, not everything: decoded images would fill the memory faster than a disk takes them.
        window: deque[Future[list[T | UnreadableError]]] = deque()
        window.extend(pool.submit(work, start) for start in islice(starts, 2 * workers))
        try:
            while window:
                done = window.popleft().result()
                window.extend(pool.submit(work, start) for start in islice(starts, 1))
                yield from done
        finally:
            pool.shutdown(cancel_futures=True)
