"""Order and augmentation as pure functions of (seed, epoch, sample index).

So a batch does not depend on how many ranks share it, on the loader, or on where an epoch was resumed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Shard:
    """Which part of every batch is this process's: part `index` of `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count} does not exist; use 0 to count - 1")


def epoch_order(num: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of `num` samples in which `epoch` sees them, `(num,)`; the same on every rank."""
    # Not seed + epoch: then epoch 1 of seed 0 would be epoch 0 of seed 1.
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return generator.permutation(num).astype(np.int64, copy=False)


def shard_order(order: NDArray[np.int64], batch_size: int, shard: Shard, accumulation: int) -> NDArray[np.int64]:
    """This rank's samples of an epoch, micro-batch after micro-batch; `(steps * batch_size / ranks,)`.

    Step g uses `order[g * batch_size:(g + 1) * batch_size]`, cut first into `accumulation` and each of these into
    `shard.count` contiguous parts: any number of ranks sees the same steps. The last incomplete step is left out.
    Raises ValueError when a step cannot be cut evenly, or when there is none.
    """
    check_batch_size(batch_size, shard.count, accumulation)
    steps = len(order) // batch_size
    if steps == 0:
        raise ValueError(
            f"batch size {batch_size} exceeds the {len(order)} training images; "
            f"try --data.batch-size {shard.count * accumulation}"
        )
    cut = order[: steps * batch_size].reshape(steps, accumulation, shard.count, -1)
    return np.ascontiguousarray(cut[:, :, shard.index]).reshape(-1)


def check_batch_size(batch_size: int, ranks: int, accumulation: int) -> None:
    """Raise ValueError unless a batch can be cut evenly among ranks and accumulation steps."""
    parts = ranks * accumulation
    if batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        raise ValueError(
            f"batch size {batch_size} is not a multiple of {ranks} ranks x {accumulation} accumulation steps; "
            f"try --data.batch-size {nearest}"
        )


def draw_augmentation(
    indices: NDArray[np.integer], seed: int, epoch: int, pad: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Per sample whether it is mirrored, and how many pixels it moves down and right, in [-pad, pad]; each `(n,)`."""
    # A hash and no generator: a sample's draw must not depend on the batch that it is in.
    key = _mix_int(_mix_int(seed & _MASK) ^ (epoch & _MASK))
    base = _mix(indices.astype(np.uint64) ^ np.uint64(key))
    flip, down, right = (_mix(base + np.uint64(stream)) for stream in (1, 2, 3))
    span = np.uint64(2 * pad + 1)
    flips = (flip >> np.uint64(63)).astype(np.bool_)
    return flips, (down % span).astype(np.int64) - pad, (right % span).astype(np.int64) - pad


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195); arrays wrap around in silence."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    return int(_mix(np.array([x], dtype=np.uint64))[0])


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images: mirror, move, fill with the mean colour."""

    seed: int
    flip: bool
    pad: int
    fill: tuple[int, int, int]  # the mean colour, about 0 once normalised

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.flip or self.pad > 0

    def draw(
        self, indices: NDArray[np.integer], epoch: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """As `draw_augmentation`, with mirroring only where it is wanted."""
        flip, down, right = draw_augmentation(indices, self.seed, epoch, self.pad)
        return flip & self.flip, down, right

    def apply(self, images: NDArray[np.uint8], indices: NDArray[np.integer], epoch: int) -> NDArray[np.uint8]:
        """A new array: `images` `(n, height, width, 3)`, mirrored first, then moved."""
        height, width = images.shape[1:3]
        out = np.empty_like(images)
        out[:] = np.array(self.fill, dtype=np.uint8)
        for i, (flip, down, right) in enumerate(zip(*self.draw(indices, epoch), strict=True)):
            image = images[i, :, ::-1] if flip else images[i]
            to_y, to_x = _overlap(down, height), _overlap(right, width)
            out[i, to_y, to_x] = image[_overlap(-down, height), _overlap(-right, width)]
        return out


def _overlap(shift: int, length: int) -> slice:
    """Where, along one side of the target, an image moved by `shift` still is."""
    return slice(max(0, shift), min(length, length + shift))


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale - shift` in float32; a new tensor `(n, 3, height, width)`, in the memory format of `images`.

    `scale` is 1 / (255 * std) and `shift` mean / std, each `(1, 3, 1, 1)`; mean and std in [0, 1].
    """
    return torch.mul(images, scale).sub_(shift)
