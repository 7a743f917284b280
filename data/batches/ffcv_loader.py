"""Batches out of a .beton by FFCV, with its waits bounded, its errors passed on and our augmentation inside."""

import atexit
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from netslim.data.batches.pipelines import Augmentation
from netslim.data.ffcv_door import (
    AllocationQuery,
    EpochIterator,
    Loader,
    Operation,
    SimpleRGBImageDecoder,
    ToTensor,
    ToTorchImage,
)

WAIT_SECONDS = 300.0  # for one batch, the first one's compilation included; more is taken for a hang


@numba.njit(nogil=True)
def _augment(images, out, flip, down, right, fill):  # type: ignore[no-untyped-def]
    """`Augmentation.apply` into `out`, without Python's lock: the training thread goes on meanwhile."""
    num, height, width, channels = images.shape
    for i in range(num):
        for y in range(height):
            from_y = y - down[i]
            for x in range(width):
                from_x = x - right[i]
                if 0 <= from_y < height and 0 <= from_x < width:
                    if flip[i]:
                        from_x = width - 1 - from_x
                    for c in range(channels):
                        out[i, y, x, c] = images[i, from_y, from_x, c]
                else:
                    for c in range(channels):
                        out[i, y, x, c] = fill[c]


class Augment(Operation):  # type: ignore[misc]
    """`Augmentation` as a step of an FFCV pipeline, for the epoch that `epoch` says."""

    def __init__(self, augmentation: Augmentation) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.fill = np.array(augmentation.fill, dtype=np.uint8)
        self.epoch = 0

    def generate_code(self) -> Callable[..., Any]:
        def augment(images: Any, out: Any, indices: Any) -> Any:
            # As arguments: numba would freeze whatever a compiled closure holds, the epoch too.
            _augment(images, out, *self.augmentation.draw(indices, self.epoch), self.fill)
            return out

        augment.with_indices = True  # type: ignore[attr-defined]
        return augment

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        # jit_mode off: the loader's thread calls `augment` as plain Python.
        return replace(previous_state, jit_mode=False), AllocationQuery(previous_state.shape, previous_state.dtype)


class _Epoch(EpochIterator):  # type: ignore[misc]
    """FFCV's iterator, which would leave its reader waiting for ever when its thread fails."""

    def run(self) -> None:
        self.error: BaseException | None = None
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def run_pipeline(self, *args: Any) -> Any:
        if self.terminate_event.is_set():
            raise StopIteration  # as at the epoch's end: FFCV itself would first fill its queue again
        return super().run_pipeline(*args)

    def __next__(self) -> Any:
        name = self.loader.fname
        with self.output_queue.not_empty:
            if not self.output_queue.not_empty.wait_for(self.output_queue._qsize, WAIT_SECONDS):
                raise TimeoutError(f"no batch of {name} came for {WAIT_SECONDS:.0f} s; is its disk reachable?")
        try:
            return super().__next__()
        except StopIteration:
            if self.error is not None:
                raise RuntimeError(f"reading {name} failed: {self.error!r}") from self.error
            raise

    def stop(self) -> None:
        """Ends the thread, also in the middle of the epoch."""
        self.close()
        while self.is_alive():
            try:
                self.output_queue.get_nowait()
            except Empty:
                self.join(0.01)


_running: "weakref.WeakSet[_Epoch]" = weakref.WeakSet()


@atexit.register  # later no other thread runs any more, and from Python 3.13 on one would wait for it for ever
def _stop_running() -> None:
    """End the epochs that an error has left in the middle."""
    for epoch in list(_running):
        epoch.stop()


class FfcvReader:
    """Reads any samples of a .beton in any order."""

    def __init__(
        self, path: Path, batch_size: int, augmentation: Augmentation | None, num_workers: int, device: torch.device
    ) -> None:
        self._augment = Augment(augmentation) if augmentation is not None and augmentation.active else None
        steps = [SimpleRGBImageDecoder(), *([self._augment] if self._augment else []), ToTensor(), ToTorchImage()]
        try:
            # Without a seed FFCV draws one from numpy's global generator; the order comes with every epoch anyway.
            self._loader = Loader(
                str(path),
                batch_size=batch_size,
                num_workers=max(1, num_workers),  # FFCV takes 0 for all cores
                os_cache=True,
                seed=0,
                # Labels are in the index, which is in memory: a pipeline of their own would only be compiled.
                pipelines={"image": steps, "label": None},
            )
            field = self._loader.field_name_to_f_ix["label"]
            self._labels = torch.from_numpy(self._loader.reader.metadata[f"f{field}"].astype(np.int64))
        # all that FFCV and numpy raise, by where the file is odd
        except (AssertionError, LookupError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"{path} is not a .beton that netslim wrote ({error!r:.200})") from error
        self._device = device

    def __len__(self) -> int:
        return len(self._labels)

    def batches(self, order: NDArray[np.int64], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images `(n, 3, height, width)` uint8, whose memory is used again for later batches, and labels `(n,)`."""
        if len(order) == 0:
            return
        if self._augment is not None:
            self._augment.epoch = epoch
        # FFCV makes its streams on the current GPU.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            iterator = _Epoch(self._loader, order)
        _running.add(iterator)
        try:
            start = 0
            for (images,) in iterator:
                labels = self._labels[torch.from_numpy(order[start : start + len(images)])]
                start += len(images)
                yield images, labels
        finally:
            iterator.stop()
