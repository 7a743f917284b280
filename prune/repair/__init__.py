"""A cut network, the whole one and images in; the same shapes out, computing again what the whole computed.

No step is a training step: labels only judge, nothing is fitted to them. Images and sums over ranks come in as a
`Calibration`, so that nothing here knows of data or processes. What a repair could not restore is a score, too.
"""

from netslim.prune.repair.absorption import absorb
from netslim.prune.repair.calibration import Calibration, Chunk, chunk_size
from netslim.prune.repair.elimination import elimination_scores
from netslim.prune.repair.foresight import foreseen, too_few
from netslim.prune.repair.steps import Repair, RepairConfig, repair

__all__ = [
    "Calibration",
    "Chunk",
    "Repair",
    "RepairConfig",
    "absorb",
    "chunk_size",
    "elimination_scores",
    "foreseen",
    "repair",
    "too_few",
]
