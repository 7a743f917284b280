"""An engine's configuration in; a `Runtime` out: this process among the ranks, and all that they do together.

Sums, checks and decisions over ranks are the same on each of them, BatchNorm statistics those of all images; a rank
that is lost is named. Nothing else imports DeepSpeed or `torch.distributed`, nor Accelerate but for its launcher and
its clients of trackers.
"""

import warnings

with warnings.catch_warnings():
    # of progress bars, which nothing here has Accelerate show: in a notebook without ipywidgets
    warnings.filterwarnings("ignore", "IProgress not found")
    import accelerate  # noqa: F401

from netslim.train.ranks.engine import EngineConfig, asks_for_cpu, check_devices, num_gpus
from netslim.train.ranks.group import LostRankError, weights_digest
from netslim.train.ranks.masters import Fragment, Masters, whole
from netslim.train.ranks.runtime import Runtime
from netslim.train.ranks.shares import check_values, few_images
from netslim.train.ranks.statistics import combined, freeze, synchronise

__all__ = [
    "EngineConfig",
    "Fragment",
    "LostRankError",
    "Masters",
    "Runtime",
    "asks_for_cpu",
    "check_devices",
    "check_values",
    "combined",
    "few_images",
    "freeze",
    "num_gpus",
    "synchronise",
    "weights_digest",
    "whole",
]
