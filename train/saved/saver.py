"""How a training run is saved, and taken up again."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from netslim.base import plainly
from netslim.train.ranks import Runtime, combined
from netslim.train.saved.checkpoint import Snapshot, Store
from netslim.train.saved.contents import check_tensors, check_values
from netslim.train.saved.progress import Progress
from netslim.train.saved.trainee import Trainee

T = TypeVar("T")


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CheckpointConfig:
    minutes: Annotated[float, Field(gt=0)] | None = 10.0
    """Save at the end of a step when this long has passed since the last save; None: not by the clock."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Save after every so many optimizer steps."""
    epochs: Annotated[int, Field(ge=1)] | None = 1
    """Save after every so many epochs."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that stay, besides that of the best accuracy."""


class Preempted(Exception):  # noqa: N818  # not an error: the run ends in good order, to be taken up again
    """A signal asked to stop; a checkpoint was written where there is a place for it."""


class Saver:
    """Saves a run's progress when it is due, and takes it up again; every rank calls every method.

    What ranks have of their own (BatchNorm statistics between epochs, random numbers, sums) is saved for each. At
    another number of ranks the statistics are combined, and the sums added, so that only dropout draws differ.
    Training goes on as soon as there is a copy in memory; a thread of rank 0 writes it, one at a time.
    """

    def __init__(
        self,
        store: Store | None,
        run: Runtime,
        config: CheckpointConfig | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.store, self.run, self.config = store, run, config or CheckpointConfig()
        self.identity = dict(identity or {})
        self._saved = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "netslim-checkpoint")
        self._writing: Future[Any] | None = None

    def check_room(self, model: nn.Module) -> None:
        """Raise OSError, on every rank, where the disk cannot hold what training of a model will leave there.

        That is a checkpoint beside the one before it, and the weights at the end.
        """
        if self.store is None:
            return
        store, ranks = self.store, self.run.world_size
        weights = sum(each.numel() * each.element_size() for each in model.parameters())
        buffers = sum(each.numel() * each.element_size() for each in model.buffers())
        saves = any(x is not None for x in (self.config.minutes, self.config.steps, self.config.epochs))
        need = weights + buffers + 2 * saves * (2 * weights + ranks * buffers)
        self.run.on_main(lambda: store.check_room(need))

    def after_step(self, training: Trainee, progress: Progress) -> None:
        """Save where it is due; stop where a signal asks for it."""
        minutes, steps = self.config.minutes, self.config.steps
        due = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        # rank 0's clock decides, or ranks would save at different steps
        stop, due = self.run.agree(training.step_number(progress), stop=self.run.stop_requested, due=due)
        if steps is not None and training.step_number(progress) % steps == 0:
            due = True
        ends_epoch = progress.step == training.steps_per_epoch
        if stop or (due and not (ends_epoch and self._saves_after(progress.epoch + 1))):
            self.save(training, progress)
        if stop:
            self.settle()
            raise Preempted(f"stopped by a signal after step {training.step_number(progress)}")

    def after_epoch(self, training: Trainee, progress: Progress) -> None:
        if self._saves_after(progress.epoch):
            self.save(training, progress)

    def _saves_after(self, epochs: int) -> bool:
        return self.config.epochs is not None and epochs % self.config.epochs == 0

    def save(self, training: Trainee, progress: Progress) -> None:
        """Write a checkpoint, from all ranks' states; raises, on every rank, what `settle` and `confirm` do."""
        if self.store is None:
            return
        training.confirm(progress)
        started = time.perf_counter()
        self.settle()
        shared = {f"weights/{name}": tensor for name, tensor in training.masters.weights().items()}
        shared |= {f"momenta/{name}": tensor for name, tensor in training.masters.momenta().items()}
        ranks = self.run.gather(_own_state(training, progress))

        def begin() -> None:
            assert self.store is not None
            assert ranks is not None, "this is rank 0"
            tensors = {name: tensor.cpu().contiguous() for name, tensor in shared.items()}  # copies already
            for rank, own in enumerate(ranks):
                tensors |= {f"ranks/{rank}/{name}": tensor for name, tensor in own.items()}
            values = {
                "identity": self.identity,
                "epoch": progress.epoch,
                "step_in_epoch": progress.step,
                "metrics": list(progress.metrics),
                "wandb_id": training.record.wandb_id,
                "seconds": progress.seconds_so_far(),
                "skipped": progress.skipped,
                "world_size": self.run.world_size,
                "scaler": self.run.scaler_state(),
                "slimmed": training.slimming.state if training.slimming is not None else None,
            }
            snapshot, best = Snapshot(training.step_number(progress), tensors, values), _best_step(progress.metrics)
            self._writing = self._writer.submit(self.store.save, snapshot, best)

        self.run.on_main(begin)
        self._saved = time.monotonic()
        progress.saving_seconds += time.perf_counter() - started

    def settle(self) -> None:
        """Wait until the last checkpoint is on the disk; OSError, on every rank, where it could not be written."""
        if self.store is None:
            return

        def wait() -> None:
            writing, self._writing = self._writing, None
            if writing is not None:
                writing.result()

        self.run.on_main(wait)

    def close(self) -> None:
        """Let the thread finish what it writes, also after an error."""
        self._writer.shutdown()

    def resume(self, training: Trainee) -> Progress | None:
        """Bring the model, the optimizer and this rank to where the newest checkpoint was; None where there is none."""
        if self.store is None:
            return None
        store, record = self.store, training.record

        def find() -> int | None:
            store.sweep()
            found = store.newest(lambda line: record.say(line, warning=True))
            return None if found is None else found.step

        step = self.run.on_main(find)
        if step is None:
            return None

        def checked(function: Callable[[], T]) -> T:
            try:
                return function()
            except ValueError as error:
                raise ValueError(
                    f"the checkpoint after step {step} in {store.directory} is not one that this run saves ({error}); "
                    "use another --run-dir, or delete the directory"
                ) from None

        def read() -> tuple[Snapshot, nn.Module | None]:
            snapshot = store.read(step)
            self._check_identity(snapshot)
            checked(lambda: check_values(training, snapshot))
            return snapshot, checked(lambda: training.slimmed_model(snapshot.values.get("slimmed")))

        snapshot, smaller = self.run.on_all(read)
        if smaller is not None:
            training.resume_slimmed(smaller)
        self.run.on_all(lambda: checked(lambda: check_tensors(training, snapshot)))
        progress = _restore(training, snapshot)
        record.resume(progress.metrics, snapshot.values.get("wandb_id"))
        record.say(f"goes on from the checkpoint after step {step}{_apart(snapshot, self.run)}")
        return progress

    def _check_identity(self, snapshot: Snapshot) -> None:
        theirs = snapshot.values.get("identity")
        if not isinstance(theirs, dict):
            theirs = {}
        differing = [key for key in {*theirs, *self.identity} if theirs.get(key) != self.identity.get(key)]
        if differing:
            raise ValueError(
                f"{self.store and self.store.directory} is of another run: {', '.join(sorted(differing))} "
                "differ; use another --run-dir, or delete the directory"
            )


def _apart(snapshot: Snapshot, run: Runtime) -> str:
    """Say what tells a run that goes on from one that was never interrupted; nothing where nothing does."""
    then, was_on_gpu = snapshot.values["world_size"], "ranks/0/rng/cuda" in snapshot.tensors
    draws = "dropout draws other numbers"
    if then != run.world_size:
        return f", of {then} processes, as {run.world_size}: BatchNorm statistics are combined, and {draws}"
    return f", of another kind of device: {draws}" if was_on_gpu != (run.device.type == "cuda") else ""


def _own_state(training: Trainee, progress: Progress) -> dict[str, Tensor]:
    """What differs between ranks, on the CPU."""
    own = {f"buffers/{name}": buffer for name, buffer in training.trained.named_buffers()}
    own["rng/cpu"] = torch.get_rng_state()
    if training.run.device.type == "cuda":
        own["rng/cuda"] = torch.cuda.get_rng_state(training.run.device)
    if progress.sums is not None:
        own["sums"] = progress.sums
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in own.items()}


def _restore(training: Trainee, snapshot: Snapshot) -> Progress:
    """Set everything to what the snapshot holds; the model too, so that ZeRO's live weights fit its masters."""
    tensors, values, run = snapshot.tensors, snapshot.values, training.run
    weights, momenta = (_below(prefix, tensors) for prefix in ("weights/", "momenta/"))
    training.masters.restore(weights, momenta)
    run.load_live_weights(training.trained, weights)
    ranks = [_below(f"ranks/{rank}/", tensors) for rank in range(values["world_size"])]
    sums: Tensor | None
    if values["world_size"] == run.world_size:
        own = ranks[run.rank]
        buffers, sums = _below("buffers/", own), own.get("sums")
        torch.set_rng_state(own["rng/cpu"])
        if "rng/cuda" in own and run.device.type == "cuda":
            torch.cuda.set_rng_state(own["rng/cuda"], run.device)
    else:
        buffers = combined([_below("buffers/", own) for own in ranks])
        sums = sum(own["sums"] for own in ranks) if "sums" in ranks[0] and run.is_main else None  # type: ignore[assignment]
    training.trained.load_state_dict(buffers, strict=False)
    run.load_scaler_state(values["scaler"])
    return Progress(
        epoch=values["epoch"],
        step=values["step_in_epoch"],
        metrics=values["metrics"],
        sums=None if sums is None else sums.to(run.device),
        seconds=values["seconds"],
        skipped=values["skipped"],
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _best_step(metrics: list[dict[str, Any]]) -> int | None:
    """The step after which accuracy was best; of equal ones the first."""
    return max(metrics, key=lambda line: (line["accuracy"], -line["step"]))["step"] if metrics else None
