"""Whether a checkpoint holds what a training saves: its hashes do not say who wrote it."""

import json
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from netslim.base import complaint
from netslim.train.saved.checkpoint import Snapshot
from netslim.train.saved.trainee import Trainee


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True))
class _Line:
    """What is needed of an epoch's metrics."""

    step: int
    accuracy: float


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True))
class _Values:
    """The values of a checkpoint."""

    epoch: Annotated[int, Field(ge=0)]
    step_in_epoch: Annotated[int, Field(ge=0)]
    metrics: list[_Line]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    world_size: Annotated[int, Field(ge=1)]
    skipped: Annotated[int, Field(ge=0)]
    wandb_id: Annotated[str, Field(pattern="^[0-9a-z]{1,40}$")] | None
    scaler: dict[str, float | int]
    slimmed: str | None = None


def check_values(training: Trainee, snapshot: Snapshot) -> None:
    """Raise ValueError, before anything is restored, unless the snapshot's values are those of `Saver.save`.

    Hashes say that files are those that were written, not by whom: a checkpoint may come from a stranger.
    """
    try:
        # through JSON: in strict mode Python's dictionaries are no dataclasses, JSON's objects are
        values = TypeAdapter(_Values).validate_json(json.dumps(dict(snapshot.values)))
    except ValidationError as error:
        raise ValueError(complaint(error)) from None
    epochs, steps = training.config.epochs, training.steps_per_epoch
    epoch, step = values.epoch, values.step_in_epoch
    if epoch > epochs or step > steps or epoch * steps + step != snapshot.step:
        raise ValueError(f"epoch {epoch + 1} step {step} of {epochs} epochs of {steps} steps")
    if len(values.metrics) != values.epoch:
        raise ValueError(f"metrics of {len(values.metrics)} epochs, {values.epoch} were done")
    if not values.scaler.keys() <= training.run.scaler_state().keys():
        raise ValueError("a loss scaler's state that is none")
    if values.slimmed is not None and training.slimming is None:
        raise ValueError("a network that was slimmed while it trained")


def check_tensors(training: Trainee, snapshot: Snapshot) -> None:
    """Raise ValueError unless the snapshot holds the tensors of what is trained now, as `Saver.save` puts them in."""
    world_size = snapshot.values["world_size"]
    have = {name: (tensor.shape, tensor.dtype) for name, tensor in snapshot.tensors.items()}
    if world_size > len(have):  # else the next lines would take as long as it says
        raise ValueError(f"{len(have)} tensors of {world_size} processes")
    want = {
        f"{prefix}/{name}": (shape, torch.float32)
        for prefix in ("weights", "momenta")
        for name, shape in training.masters.shapes.items()
    }
    random = torch.get_rng_state()
    for rank in range(world_size):
        own = {f"buffers/{name}": (value.shape, value.dtype) for name, value in training.trained.named_buffers()}
        own |= {"rng/cpu": (random.shape, random.dtype)}
        optional = {"sums": (torch.Size([3]), torch.float64), "rng/cuda": (torch.Size([16]), torch.uint8)}
        own |= {name: what for name, what in optional.items() if f"ranks/{rank}/{name}" in have}
        want |= {f"ranks/{rank}/{name}": what for name, what in own.items()}
    odd = sorted(name for name in {*want, *have} if want.get(name) != have.get(name))
    if odd:
        raise ValueError(f"{len(odd)} tensors are missing, unexpected or of another shape, as {odd[0]!r:.80}")
    if len({f"ranks/{rank}/sums" in have for rank in range(world_size)}) > 1:
        raise ValueError("sums of some ranks only")
    for rank in range(world_size):
        try:
            torch.Generator().set_state(snapshot.tensors[f"ranks/{rank}/rng/cpu"])
        except RuntimeError as error:
            raise ValueError(f"the random numbers of rank {rank}: {error}") from None
