"""What a stage has to say in; lines on the terminal, metrics.jsonl, a run in W&B and in other trackers out.

No tracker can stop a training, or make it wait for more than seconds: what goes wrong with one is a warning line. How
one is spoken to is nobody else's business.
"""

from netslim.train.record.pace import Leg, Pace
from netslim.train.record.record import OF_ENVIRONMENT, Record, RecordConfig
from netslim.train.record.wandb_content import Artefact, Lineage, Picture
from netslim.train.record.wandb_server import Probe, has_key

__all__ = [
    "OF_ENVIRONMENT",
    "Artefact",
    "Leg",
    "Lineage",
    "Pace",
    "Picture",
    "Probe",
    "Record",
    "RecordConfig",
    "has_key",
]
