"""The training that is saved: what is read of it, and what is given back to it."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from netslim.train.ranks import Masters, Runtime
from netslim.train.saved.progress import Progress


class Schedule(Protocol):
    """How long the training is."""

    @property
    def epochs(self) -> int: ...


class Slimmed(Protocol):
    """What makes its network smaller on the way."""

    @property
    def state(self) -> str | None:
        """Which channels are gone, as JSON; None: none."""


class Recorded(Protocol):
    """Where it says what happens."""

    @property
    def wandb_id(self) -> str | None: ...
    def say(self, line: str, *, warning: bool = False) -> None: ...
    def resume(self, metrics: Sequence[dict[str, Any]], wandb_id: str | None = None) -> None: ...


class Trainee(Protocol):
    """A training between two optimizer steps; every rank calls every method."""

    @property
    def config(self) -> Schedule: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def run(self) -> Runtime: ...
    @property
    def record(self) -> Recorded: ...
    @property
    def slimming(self) -> Slimmed | None: ...
    @property
    def trained(self) -> nn.Module:
        """Has the buffers, and the weights that the forward pass reads."""

    @property
    def masters(self) -> Masters:
        """Have the float32 weights, and the momenta."""

    def step_number(self, progress: Progress) -> int:
        """Optimizer steps that were done since the beginning."""

    def confirm(self, progress: Progress) -> None:
        """Make sure that these steps were taken, before they are saved."""

    def slimmed_model(self, state: str | None) -> nn.Module | None:
        """The network in the shapes of a checkpoint, if those are smaller; no other rank is asked."""

    def resume_slimmed(self, model: nn.Module) -> None:
        """Take what `slimmed_model` gave; its weights and momenta are yet to be read."""
