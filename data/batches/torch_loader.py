"""The same batches by torch's own DataLoader, straight from the source: slower, and nothing to compile."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from netslim.data.batches.pipelines import Augmentation
from netslim.data.pixels import UnreadableError, hush
from netslim.data.splits import Split

_Key = tuple[int, NDArray[np.int64]]  # epoch and samples of one batch


class _Batches(Dataset[tuple[Tensor, Tensor] | UnreadableError]):
    """Whole batches by key: the augmentation needs the epoch, which workers that live on do not know.

    An image that cannot be read is given as a value: of what a worker raises torch makes an error of its own.
    """

    def __init__(self, split: Split, augmentation: Augmentation | None) -> None:
        self._split = split
        self._augmentation = augmentation

    def __getitem__(self, key: _Key) -> tuple[Tensor, Tensor] | UnreadableError:
        epoch, indices = key
        try:
            with hush:
                pairs = [self._split[int(i)] for i in indices]
        except UnreadableError as error:
            return error
        images = np.stack([image for image, _ in pairs])
        if self._augmentation is not None and self._augmentation.active:
            images = self._augmentation.apply(images, indices, epoch)
        labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2), labels  # a view: channels_last in memory


class _Keys(Sampler[_Key]):
    """The batches of the epoch that is set."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.epoch = 0
        self.order = np.zeros(0, dtype=np.int64)

    def __iter__(self) -> Iterator[_Key]:
        for start in range(0, len(self.order), self._batch_size):
            yield self.epoch, self.order[start : start + self._batch_size]


class TorchReader:
    """Reads any samples of a split in any order."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augmentation: Augmentation | None,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self._keys = _Keys(batch_size)
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(split, augmentation),
            batch_size=None,  # a key is a batch already
            sampler=self._keys,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            # fork would copy locks that threads hold (FFCV, CUDA, gloo) into the workers.
            multiprocessing_context="spawn" if num_workers else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # without one, every epoch draws from torch's global one
        )

    def batches(self, order: NDArray[np.int64], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `(n, 3, height, width)` uint8, channels_last, and labels `(n,)` int64. Raises UnreadableError."""
        self._keys.order, self._keys.epoch = order, epoch
        for batch in self._loader:
            if isinstance(batch, UnreadableError):
                raise batch
            yield batch
