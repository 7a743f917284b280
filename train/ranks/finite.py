"""Steps that are not finite are refused, and nothing waits for the device to find out."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Refusals(Protocol):
    """What refuses the optimizer's steps whose loss or gradient is not finite."""

    def look(self, loss: Tensor) -> None:
        """Before a step: have it refused unless its gradients are finite."""

    def count(self) -> int:
        """Steps that were refused since the first that was not finite, that one included; waits for the device."""

    @property
    def loss_was_finite(self) -> Tensor:
        """Whether this rank's loss of that first step was."""

    def forget(self) -> None:
        """Take steps again."""


class OnDevice:
    """Refuses a step by a flag on the device, which a fused optimizer reads there, as it does a loss scaler's.

    The flag stays up: the steps after it are refused too, until somebody reads it. So weights and momenta are those
    of the step before the first that was not finite, however late it is found out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], device: torch.device):
        self._optimizer, self._parameters = optimizer, list(parameters)
        self._count = torch.zeros((), device=device)
        self._loss_was_finite = torch.ones((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def look(self, loss: Tensor) -> None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        is_bad = ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        self._loss_was_finite &= torch.isfinite(loss) | (self._count > 0)
        self._count += is_bad | (self._count > 0)
        self._optimizer.found_inf = (self._count > 0).float()  # type: ignore[attr-defined]

    def count(self) -> int:
        return int(self._count)

    @property
    def loss_was_finite(self) -> Tensor:
        return self._loss_was_finite

    def forget(self) -> None:
        self._count.zero_()
        self._loss_was_finite.fill_(True)


class ByEngine:
    """The engine refuses such steps itself, and says so of the last one alone: DeepSpeed, or a loss scaler.

    A scaler need not say it: an overflow now and then is its way of finding the scale.
    """

    def __init__(self, refused_last: Callable[[], bool]) -> None:
        self._refused_last, self._refused = refused_last, False

    def look(self, loss: Tensor) -> None:
        self._refused = self._refused_last()
        self._loss_was_finite = torch.isfinite(loss)

    def count(self) -> int:
        return int(self._refused)

    @property
    def loss_was_finite(self) -> Tensor:
        return self._loss_was_finite

    def forget(self) -> None:
        self._refused = False
