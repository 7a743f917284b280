"""A training between two steps in; a checkpoint out, and the training back from it, on any number of ranks.

A checkpoint is complete or absent, verified before it is used, and never a pickle. What it holds, and when one is due,
is decided here alone; what is trained is seen only as a `Trainee`.
"""

from netslim.train.saved.checkpoint import Snapshot, Store
from netslim.train.saved.progress import Progress
from netslim.train.saved.saver import CheckpointConfig, Preempted, Saver

__all__ = [
    "CheckpointConfig",
    "Preempted",
    "Progress",
    "Saver",
    "Snapshot",
    "Store",
]
