"""Images in, batches out: named sources, .beton files, and loaders that are pure functions of (seed, epoch, index)."""

from netslim.data.batches import (
    CalibrationLoader,
    Loaders,
    Shard,
    check_batch_size,
    open_calibration,
    open_loaders,
)
from netslim.data.sources import DataConfig, open_source
from netslim.data.splits import Source
from netslim.data.store import DataInfo, notes_here, prepare, prepared, stored

__all__ = [
    "CalibrationLoader",
    "DataConfig",
    "DataInfo",
    "Loaders",
    "Shard",
    "Source",
    "check_batch_size",
    "notes_here",
    "open_calibration",
    "open_loaders",
    "open_source",
    "prepare",
    "prepared",
    "stored",
]
