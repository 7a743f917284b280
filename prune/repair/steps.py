"""Repair: what can be restored of a cut network before, and without, any training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as configuration
from torch import nn

from netslim.base import plainly
from netslim.prune.choose import Plan
from netslim.prune.map import few
from netslim.prune.record import replica
from netslim.prune.repair.absorption import absorb
from netslim.prune.repair.balance import balance
from netslim.prune.repair.calibration import FEWEST, Calibration, held_out_loss
from netslim.prune.repair.foresight import left_of, said, systems_of, too_few, unsolved
from netslim.prune.repair.recalibration import recalibrate
from netslim.prune.repair.reconstruction import reconstruct

Step = Literal["absorb", "reconstruct", "recalibrate"]
STEPS: tuple[Step, ...] = ("absorb", "reconstruct", "recalibrate")
SAME_LOSS = 1e-3
"""Largest difference of a loss, relative to max(1, loss), that counts as rounding."""


@plainly
@configuration(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RepairConfig:
    """What is done to a cut network before it is trained again."""

    steps: tuple[Step, ...] = STEPS
    """absorb: what removed channels gave constantly goes into the next layer. reconstruct: each layer's weights are
    solved anew by least squares. recalibrate: BatchNorm statistics are measured anew. None: no repair."""
    auto: bool = True
    """Keep a step only if it lowers the loss on calibration images that nothing was fitted to."""
    balance: bool = True
    """Give a repaired network, with the same outputs, weights of the sizes that training expects."""
    images: Annotated[int, Field(ge=FEWEST)] = 2048
    """Training images to measure by, or all where there are fewer."""

    @property
    def unread(self) -> dict[str, str]:
        """The fields that nothing reads beside the others, and why."""
        return {} if self.steps else dict.fromkeys(("auto", "balance"), "steps is empty")


@dataclass(frozen=True)
class Tried:
    """A step of a repair, and what came of it."""

    step: Step
    loss: float
    """On the held-out calibration images, after it."""
    is_kept: bool


@dataclass(frozen=True)
class Repair:
    """What a repair did."""

    loss_cut: float
    """Mean cross-entropy on the held-out calibration images before any step."""
    tried: tuple[Tried, ...]
    is_balanced: bool
    """Whether weights, gammas and statistics were changed together afterwards, to the same outputs (`balance`)."""
    notes: tuple[str, ...] = ()
    """What was left as it was, or undone, and why, in one line each."""

    @property
    def kept(self) -> tuple[Step, ...]:
        """The steps that are in the network that came out."""
        return tuple(tried.step for tried in self.tried if tried.is_kept)

    @property
    def loss(self) -> float:
        """On the same images as `loss_cut`, after the steps that were kept."""
        return next((tried.loss for tried in reversed(self.tried) if tried.is_kept), self.loss_cut)

    def __str__(self) -> str:
        steps = [f"{tried.step} {tried.loss:.4f}{'' if tried.is_kept else ' (undone)'}" for tried in self.tried]
        notes = "".join(f"; {note}" for note in self.notes)
        balanced = "; balanced" * self.is_balanced
        return f"held-out loss after the cut {self.loss_cut:.4f}; {', '.join(steps)}{balanced}{notes}"


def repair(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    calibration: Calibration,
    config: RepairConfig | None = None,
) -> tuple[nn.Module, Repair]:
    """Repair what `cut(model, plan)` gave: a copy of `small` with the same shapes, and what was done; no training step.

    The steps run in the order of `STEPS`. With `auto` one that does not lower the loss on the held-out images is
    undone, so that the result is never worse there than the cut. What was repaired is then balanced (`balance`), which
    changes no output: else it is undone too. On several ranks all end with the same weights.

    A layer that the images cannot determine, or whose matrices would take too much memory (more than 10,240 weights for
    each output), is not reconstructed but left as it is, and the report says so. The model and `small` are unchanged,
    and what comes back is in train or eval mode where `small` is, module by module.

    Raises: ValueError if there are fewer than 16 images, or if activations are not finite.
    """
    config = config or RepairConfig()
    refusal = too_few(calibration.num_images)
    if refusal is not None:
        raise ValueError(refusal)
    best = replica(small, {}).eval()
    loss_cut, num_held_out = held_out_loss(best, calibration)
    loss, tried = loss_cut, []
    notes: list[str] = []
    for step in (step for step in STEPS if step in config.steps):
        network = replica(best, {})
        if step == "absorb":
            absorb(model, network, plan, calibration.example)
        elif step == "reconstruct":
            systems = systems_of(network, calibration.example)
            left = left_of(systems, calibration.num_images - num_held_out)
            reconstruct(model, network, plan, calibration, left)
            notes += [*said(systems, left, calibration.num_images), *unsolved(network, systems)]
        else:
            single = recalibrate(network, calibration)
            if single:
                notes.append(
                    f"recalibrate: {few([repr(name) for name in single])} met a chunk of a single value for each "
                    "channel, and normalised it by the running statistics; more images have none"
                )
        after, _ = held_out_loss(network, calibration)
        is_kept = after < loss or not config.auto
        tried.append(Tried(step, after, is_kept))
        if is_kept:
            best, loss = network, after
    is_balanced = False
    if config.balance and any(step.is_kept for step in tried):
        network = replica(best, {})
        balance(network, calibration)
        after, _ = held_out_loss(network, calibration)
        is_balanced = abs(after - loss) <= SAME_LOSS * max(1.0, loss)
        if is_balanced:
            best = network
        else:
            notes.append(f"balance, which should change nothing, came to {after:.4f} and is undone")
    for module, old in zip(best.modules(), small.modules(), strict=True):
        module.training = old.training
    return best, Repair(loss_cut, tuple(tried), is_balanced, tuple(notes))
