"""Prepared images in; batches on a device out, which are functions of (seed, epoch, index) whatever reads them.

Order, augmentation and shards are the same at any number of ranks and by each loader. Which loader reads, and what it
waits for, is nobody else's business.
"""

from netslim.data.batches.loaders import CalibrationLoader, Loaders, open_calibration, open_loaders
from netslim.data.batches.pipelines import Shard, check_batch_size

__all__ = ["CalibrationLoader", "Loaders", "Shard", "check_batch_size", "open_calibration", "open_loaders"]
