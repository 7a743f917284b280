"""Where a training run stands."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Progress:
    """Position and tallies of a run; `step` counts the optimizer steps of the present epoch."""

    epoch: int = 0
    step: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Of the epochs that are done."""
    sums: Tensor | None = None
    """This rank's loss x images, correct images and images of the present epoch so far, (3,) float64."""
    seconds: float = 0.0
    """That the present epoch took before this process."""
    saving_seconds: float = 0.0
    """For which checkpoints held up training, since the epoch before this one was noted."""
    skipped: int = 0
    """Steps of the run that were left out because they were not finite."""
    started: float = field(default_factory=time.perf_counter)

    def start_sums(self, device: torch.device) -> Tensor:
        """The sums to add to: those of a checkpoint, or zeros."""
        if self.sums is None:
            self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        return self.sums

    def seconds_so_far(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def next_epoch(self, metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)
        self.epoch, self.step, self.sums, self.seconds, self.saving_seconds = self.epoch + 1, 0, None, 0.0, 0.0
        self.started = time.perf_counter()
