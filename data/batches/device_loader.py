"""Batches out of images that all lie on the device: gathered and augmented there, so that none is waited for."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from netslim.data.batches.pipelines import Augmentation
from netslim.data.pixels import Reading
from netslim.data.sources import DataConfig
from netslim.data.splits import Source, Split
from netslim.data.store import SPLITS, decoded

_BLOCK = 1024  # images that are sent to the device at once


@dataclass(frozen=True, eq=False)
class Resident:
    """A split on a device."""

    # (num, size, size) int32, of which three bytes are the colours: whole pixels are found twice as fast as bytes
    pixels: Tensor
    labels: Tensor  # (num,) int64


# Calibration, and whoever opens the same images again, shall take no memory of their own.
_Key = tuple[str, str, Reading, torch.device]  # fingerprint of the source, split, how its images are read
_residents: WeakValueDictionary[_Key, Resident] = WeakValueDictionary()


def open_residents(config: DataConfig, source: Source, device: torch.device) -> tuple[Resident, Resident]:
    """The training and the test images on the device, decoded once: all loaders of this process share them.

    Raises ValueError when they take more than half of the memory that is free there, or when an image cannot be read.
    """
    splits: dict[_Key, Split] = {
        (source.fingerprint, name, config.reading, device): getattr(source, name) for name in SPLITS
    }
    found = {key: _residents[key] for key in splits if key in _residents}
    _check_room(config, sum(len(split) for key, split in splits.items() if key not in found), device)
    for key, split in splits.items():
        if key not in found:
            found[key] = _residents[key] = _load(split, config.size, device)
    train, test = (found[key] for key in splits)
    return train, test


def _check_room(config: DataConfig, num: int, device: torch.device) -> None:
    need, free = num * 4 * config.size**2, free_memory(device)
    if need > free // 2:
        raise ValueError(
            f"{num} images of {config.size} x {config.size} take {need / 2**20:,.0f} MiB, more than half of the "
            f"{free / 2**20:,.0f} MiB that are free on {device}; use --data.loader ffcv or torch"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:  # the kernel's own estimate: what caches files can be had too, and is no part of the free pages
        _, _, rest = Path("/proc/meminfo").read_text(encoding="ascii").partition("MemAvailable:")
        return int(rest.split()[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _load(split: Split, size: int, device: torch.device) -> Resident:
    pixels = torch.empty((len(split), size, size), dtype=torch.int32, device=device)
    labels = np.zeros(len(split), dtype=np.int64)
    with closing(decoded(split, with_sums=False)) as found:
        for start in range(0, len(split), _BLOCK):
            block = list(islice(found, _BLOCK))
            part = slice(start, start + len(block))
            images = np.zeros((len(block), size, size, 4), dtype=np.uint8)
            images[..., :3] = [each.image for each in block]
            pixels[part] = torch.from_numpy(images.view(np.int32)[..., 0])
            labels[part] = [each.label for each in block]
    return Resident(pixels, torch.from_numpy(labels).to(device))


class DeviceReader:
    """Reads any samples of a resident split in any order."""

    def __init__(self, resident: Resident, batch_size: int, augmentation: Augmentation | None) -> None:
        self._resident, self._batch_size = resident, batch_size
        self._augmentation = augmentation if augmentation is not None and augmentation.active else None

    def batches(self, order: NDArray[np.int64], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `(n, 3, height, width)` uint8, channels_last but for the fourth byte, and labels `(n,)` int64.

        All are on the device.
        """
        if len(order) == 0:
            return
        pixels, device = self._resident.pixels, self._resident.pixels.device
        moves: _Moves | None = None
        if self._augmentation is None:
            samples = _send(order, device)
        else:
            drawn = _send(np.stack([order, *self._augmentation.draw(order, epoch)]), device)
            samples, moves = drawn[0], _Moves(pixels, drawn, self._augmentation.fill)
        labels = self._resident.labels.index_select(0, samples)
        for start in range(0, len(order), self._batch_size):
            part = slice(start, start + self._batch_size)
            batch = pixels.index_select(0, samples[part]) if moves is None else moves.take(part)
            yield batch.unsqueeze(3).view(torch.uint8)[..., :3].permute(0, 3, 1, 2), labels[part]


class _Moves:
    """Which pixels the augmented images of an epoch are made of; found for all of them at once.

    `drawn` `(4, n)` int64: the samples, and what `Augmentation.draw` gave for them.
    """

    def __init__(self, pixels: Tensor, drawn: Tensor, fill: tuple[int, int, int]) -> None:
        size = pixels.shape[1]
        self._pixels = pixels
        self._fill = _send(np.array([*fill, 0], dtype=np.uint8).view(np.int32), pixels.device)
        samples, flip, down, right = drawn.unsqueeze(2)  # (n, 1) each
        side = torch.arange(size, device=pixels.device)
        rows, columns = side - down, side - right  # (n, size), where each row and column comes from
        self._has_row, self._has_column = ((line >= 0) & (line < size) for line in (rows, columns))
        columns = torch.where(flip == 1, size - 1 - columns, columns)
        rows, columns = (line.clamp(0, size - 1) for line in (rows, columns))
        self._row_starts, self._columns = (samples * size + rows) * size, columns

    def take(self, part: slice) -> Tensor:
        """The images of a part of the epoch, `(n, size, size)` int32."""
        places = self._row_starts[part, :, None] + self._columns[part, None]
        inside = self._has_row[part, :, None] & self._has_column[part, None]
        return torch.where(inside, self._pixels.take(places), self._fill)


def _send(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory until the copy is over
