"""Images in, batches out: named sources, .beton files, and loaders that are pure functions of (seed, epoch, index)."""

from netslim.data.info import DataInfo
from netslim.data.loaders import CalibrationLoader, Loaders, open_calibration, open_loaders
from netslim.data.pipelines import Shard, check_batch_size
from netslim.data.sources import DataConfig, open_source
from netslim.data.write import prepare

__all__ = [
    "CalibrationLoader",
    "DataConfig",
    "DataInfo",
    "Loaders",
    "Shard",
    "check_batch_size",
    "open_calibration",
    "open_loaders",
    "open_source",
    "prepare",
]
