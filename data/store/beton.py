"""One .beton file, written in this process: FFCV's own writer waits for ever when a worker fails."""

from collections.abc import Iterable
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netslim.data.ffcv_door import DatasetWriter, IntField, MemoryAllocator, RGBImageField, handle_sample

_PAGE = 2 * 2**20  # bytes; the smallest that FFCV takes holds the largest image of ours twice
_TABLE_ENTRY = 24  # bytes per image in the table at the end of the file


def write_beton(
    path: Path, samples: Iterable[tuple[NDArray[np.uint8], int]], num: int, size: int, quality: int | None
) -> None:
    """Writes `num` samples, images `(size, size, 3)` uint8 and labels, as JPEG where `quality` is given.

    Raises what `samples` raises, and OSError when the disk is full; the file is then incomplete.
    """
    image = RGBImageField(write_mode="raw") if quality is None else RGBImageField("jpg", jpeg_quality=quality)
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(str(path), fields, page_size=_PAGE, num_workers=1)
    writer.num_samples = num
    writer.prepare()
    # Shared memory is for FFCV's worker processes. Its end must not be left to an error's traceback, which holds on
    # to the arrays in it; `finalize` takes anything with a `buf`.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    index = np.zeros(num, dtype=writer.metadata_type)
    allocations = _write_samples(writer, samples, index)
    writer.metadata_sm = SimpleNamespace(buf=index.tobytes())
    writer.finalize(allocations)
    # Unbuffered writes to a full disk may stop half-way in silence, and FFCV does not look.
    pages = 1 + max(pointer for _, pointer, _ in allocations) // _PAGE
    expected = pages * _PAGE + _TABLE_ENTRY * num
    if path.stat().st_size != expected:
        raise OSError(ENOSPC, f"{path} has {path.stat().st_size} bytes instead of {expected}")


def _write_samples(
    writer: Any, samples: Iterable[tuple[NDArray[np.uint8], int]], index: NDArray[np.void]
) -> list[tuple[int, int, int]]:
    """Fills the file's pages and `index`; returns (sample, address, bytes) of every image."""
    allocator = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    allocator.__enter__()
    try:
        for i, sample in enumerate(samples):
            handle_sample(sample, i, index.dtype.names, index, allocator, writer.fields)
        allocator.flush_page()
    finally:
        # Not its __exit__, which would write once more after a failed write.
        allocator.fp.close()
    allocations: list[tuple[int, int, int]] = allocator.allocations
    return allocations
