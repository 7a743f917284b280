"""Prepared data to batches on a device: the same whatever the number of ranks, accumulation, or loader."""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENOSPC
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from netslim.data.batches.device_loader import DeviceReader, open_residents
from netslim.data.batches.pipelines import Augmentation, Shard, epoch_order, normalise, shard_order
from netslim.data.sources import DataConfig, open_source
from netslim.data.store import DataInfo, check_sizes, damaged

__all__ = ["CalibrationLoader", "Loaders", "Shard", "TestLoader", "TrainLoader", "open_calibration", "open_loaders"]

Batch = tuple[Tensor, Tensor]
_SHARED = "/dev/shm"
_AHEAD = 2  # batches that each of torch's worker processes reads ahead


class Reader(Protocol):
    """Reads samples in a given order, in batches; the last one may be smaller."""

    def batches(self, order: NDArray[np.int64], epoch: int) -> Iterator[Batch]:
        """Images `(n, 3, height, width)` uint8, channels_last, valid until the next; labels `(n,)` int64."""


class _ToDevice:
    """Moves batches to the device and normalises them there: a quarter of the bytes cross."""

    def __init__(self, info: DataInfo, device: torch.device) -> None:
        self._device = device
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (info.mean, info.std))
        self._scale, self._shift = 1 / (255 * std), mean / std
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        images, labels = batch
        if self._stream is None or images.is_cuda:
            images, labels = images.to(self._device), labels.to(self._device)
        else:
            # FFCV fills this memory again as soon as the next batch is asked for, so the copy has to be over by
            # then. A stream of its own waits for the copy alone, not for the training steps queued before it.
            with torch.cuda.stream(self._stream):
                images = images.to(self._device, non_blocking=True)
                labels = labels.to(self._device, non_blocking=True)
            self._stream.synchronize()
            for moved in (images, labels):
                moved.record_stream(torch.cuda.current_stream(self._device))
        return normalise(images, self._scale, self._shift), labels


class TrainLoader:
    """The training batches of one rank, epoch by epoch; its length is the micro-batches of an epoch."""

    def __init__(
        self, reader: Reader, to_device: _ToDevice, config: DataConfig, num: int, shard: Shard, seed: int, parts: int
    ) -> None:
        self._reader, self._to_device = reader, to_device
        self._config, self._num, self._shard, self._seed, self._parts = config, num, shard, seed, parts
        self._opened = 0
        self.steps_per_epoch = num // config.batch_size
        self._order(0)  # so that a batch size that cannot be cut is refused now

    def __len__(self) -> int:
        return self.steps_per_epoch * self._parts

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Images `(n, 3, size, size)` float32, normalised, channels_last, and labels `(n,)` int64, on the device.

        The first `first_batch` micro-batches are left out, without decoding them. One epoch is open at a time:
        reading on in an earlier one raises RuntimeError.
        """
        self._opened += 1
        opened = self._opened
        size = self._config.batch_size // (self._parts * self._shard.count)
        for batch in self._reader.batches(self._order(epoch)[first_batch * size :], epoch):
            if opened != self._opened:
                raise RuntimeError("this epoch was left: another one has been opened since; read one at a time")
            yield self._to_device(batch)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = epoch_order(self._num, self._seed, epoch)
        return shard_order(order, self._config.batch_size, self._shard, self._parts)


class TestLoader:
    """One rank's part of the test images: over all ranks every image comes once, so a rank may have none."""

    def __init__(self, reader: Reader, to_device: _ToDevice, batch_size: int, num: int, shard: Shard) -> None:
        self._reader, self._to_device = reader, to_device
        self._order = np.arange(shard.index, num, shard.count, dtype=np.int64)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._reader.batches(self._order, 0):
            yield self._to_device(batch)


class CalibrationLoader:
    """Training images without augmentation, in chunks that are numbered, and the same, over any number of ranks."""

    def __init__(self, reader: Reader, to_device: _ToDevice, order: NDArray[np.int64], size: int, shard: Shard) -> None:
        self._reader, self._to_device, self._order = reader, to_device, order
        self._numbers = range(shard.index, math.ceil(len(order) / size), shard.count)
        own = [order[number * size : (number + 1) * size] for number in self._numbers]
        self._own = np.concatenate([*own, np.zeros(0, np.int64)])
        self.num_images = len(order)
        """Of all ranks together."""

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The number of each of this rank's chunks, its images and labels, as `TrainLoader.epoch` gives them."""
        for number, batch in zip(self._numbers, self._reader.batches(self._own, 0), strict=True):
            yield number, *self._to_device(batch)

    def first(self, count: int) -> Tensor:
        """The first images `(count, 3, size, size)`, the same on every rank."""
        images, _ = self._to_device(next(self._reader.batches(self._order[:count], 0)))
        return images


@dataclass(frozen=True)
class Loaders:
    """The training and test batches of one rank, and what they are of."""

    train: TrainLoader
    test: TestLoader
    info: DataInfo


def open_loaders(
    config: DataConfig,
    info: DataInfo,
    shard: Shard,
    *,
    seed: int,
    accumulation: int = 1,
    device: torch.device,
) -> Loaders:
    """Opens what `prepare` gave, for one rank; each optimizer step takes `accumulation` micro-batches.

    Raises ValueError when the batch size cannot be cut evenly, when files are missing or cut short, or when images
    that are to stay on the device have no room there.
    """
    fill = tuple(round(255 * mean) for mean in info.mean)
    augmentation = Augmentation(seed=seed, flip=config.flip, pad=config.pad, fill=(fill[0], fill[1], fill[2]))
    micro_batch = max(1, config.batch_size // (accumulation * shard.count))
    train, test = _open_readers(config, info, micro_batch, augmentation, device)
    to_device = _ToDevice(info, device)
    return Loaders(
        train=TrainLoader(train, to_device, config, info.num_train, shard, seed, accumulation),
        test=TestLoader(test, to_device, config.eval_batch_size, info.num_test, shard),
        info=info,
    )


def open_calibration(
    config: DataConfig,
    info: DataInfo,
    shard: Shard,
    *,
    num_images: int,
    chunk_size: int,
    seed: int,
    device: torch.device,
) -> CalibrationLoader:
    """Opens ``num_images`` training images drawn by the seed, or all where there are fewer, for one rank.

    Raises ValueError as ``open_loaders`` does.
    """
    order = epoch_order(info.num_train, seed, 0)[:num_images]
    reader, _ = _open_readers(config, info, chunk_size, None, device)
    return CalibrationLoader(reader, _ToDevice(info, device), order, chunk_size, shard)


def _check_shared_memory(need: int) -> None:
    """Raise OSError where batches of so many bytes, which worker processes hand over there, find no room."""
    free = shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else need
    if free < need:
        raise OSError(
            ENOSPC,
            f"{os.strerror(ENOSPC)}: worker processes hand over batches there, about {need / 2**20:,.1f} MiB, and "
            f"{free / 2**20:,.1f} MiB are free; free some, give the container more (--shm-size, --ipc=host), or use "
            "--data.num-workers 0",
            _SHARED,
        )


def _open_readers(
    config: DataConfig, info: DataInfo, micro_batch: int, augmentation: Augmentation | None, device: torch.device
) -> tuple[Reader, Reader]:
    if info.directory is not None:
        check_sizes(info.directory)
        from netslim.data.batches.ffcv_loader import FfcvReader  # here: ffcv may be missing

        path, workers = info.directory, config.num_workers
        train = FfcvReader(path / "train.beton", micro_batch, augmentation, workers, device)
        test = FfcvReader(path / "test.beton", config.eval_batch_size, None, workers, device)
        if (len(train), len(test)) != (info.num_train, info.num_test):  # FFCV reads past its index without a word
            raise damaged(path, f"the files hold {len(train)} and {len(test)} images, not as info.json says")
        return train, test
    source = open_source(config)
    if (len(source.train), len(source.test)) != (info.num_train, info.num_test):
        raise ValueError(f"the images of source {config.source} have changed since they were prepared; run again")
    if info.loader == "device":
        residents = open_residents(config, source, device)
        return (
            DeviceReader(residents[0], micro_batch, augmentation),
            DeviceReader(residents[1], config.eval_batch_size, None),
        )
    from netslim.data.batches.torch_loader import TorchReader

    if config.num_workers:
        batches = min(micro_batch, info.num_train) + min(config.eval_batch_size, info.num_test)
        _check_shared_memory(config.num_workers * _AHEAD * batches * 3 * info.size**2)
    return (
        TorchReader(source.train, micro_batch, augmentation, config.num_workers, device),
        TorchReader(source.test, config.eval_batch_size, None, config.num_workers, device),
    )
