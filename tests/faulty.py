"""A network that signals its own process at a chosen moment of a run; NETSLIM_TEST_FAULT says when, as JSON."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from netslim.train import ModelConfig, build_model

VARIABLE = "NETSLIM_TEST_FAULT"
MOMENT = "fault-time"
"""In the run's directory: when the signal was sent, in seconds since 1970."""


@dataclass(frozen=True)
class Fault:
    run_dir: str
    rank: int
    place: str
    """training, evaluation (of sparsity training) or pruning."""
    signal: int
    count: int
    """The network is built or called so many times at this place, the last time being the moment."""

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


class Trigger(nn.Module):
    """Counts, and passes everything on."""

    def __init__(self, fault: Fault | None) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(self, x: Tensor) -> Tensor:
        is_one_image = not isinstance(x, Tensor) or len(x) == 1  # of those that only trace the network
        if not is_one_image or where(self.fault, self.training) == "pruning":
            self.count()
        return x

    def count(self) -> None:
        if self.fault is None or self.fault.rank != int(os.environ.get("RANK", "0")):
            return
        if self.fault.place == where(self.fault, self.training):
            self.calls += 1
            if self.calls == self.fault.count:
                Path(self.fault.run_dir, MOMENT).write_text(str(time.time()))
                os.kill(os.getpid(), self.fault.signal)


def where(fault: Fault | None, is_training: bool) -> str:
    run_dir = Path(fault.run_dir if fault else ".")
    if not (run_dir / "sparse").is_dir():
        return "the rehearsal"
    if (run_dir / "sparse" / "metrics.json").is_file():
        return "fine-tuning" if (run_dir / "prune-0.50" / "metrics.json").is_file() else "pruning"
    return "training" if is_training else "evaluation"


def build(num_classes: int = 10) -> nn.Module:
    fault = Fault(**json.loads(os.environ[VARIABLE])) if VARIABLE in os.environ else None
    trigger = Trigger(fault)
    if where(fault, is_training=False) == "pruning":
        trigger.count()
    return nn.Sequential(trigger, build_model(ModelConfig(name="vgg11", width=0.125), num_classes, seed=0))
