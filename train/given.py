"""What a training is given, whoever makes it: images, and what makes the network smaller on the way."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class TrainBatches(Protocol):
    """This rank's training images: ``len`` micro-batches an epoch, in an order that is a function of the epoch."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class TestBatches(Protocol):
    """This rank's share of the test images, each once."""

    def __iter__(self) -> Iterator[Batch]: ...


class Slimming(Protocol):
    """What makes a network smaller while it trains; every rank calls every method alike."""

    @property
    def state(self) -> str | None:
        """Which channels are gone, and since when, as JSON; None: none."""

    @property
    def num_gone(self) -> int:
        """Channels that were removed."""

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether it is time after so many steps of the training."""

    def shrink(
        self, model: nn.Module, momenta: Mapping[str, Tensor], step: int
    ) -> tuple[nn.Module, dict[str, Tensor]] | None:
        """Make the smaller network, with the momentum of what stays, after this step; None where nothing can go."""

    def restore(self, state: str) -> nn.Module:
        """Make a network, of any weights, in the shapes that a checkpoint's ``state`` says."""

    def gammas(self) -> list[nn.Parameter]:
        """Those of the present network that are penalised."""

    def metrics(self, step: int) -> dict[str, float]:
        """What an epoch's metrics say of the present network, and of all up to this step."""
