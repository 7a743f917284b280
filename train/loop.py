"""The only training loop: sparsity training and fine-tuning are the same function with and without a penalty."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netslim.train.evaluate import evaluate
from netslim.train.given import Batch, Slimming, TestBatches, TrainBatches
from netslim.train.meters import Waits, forget_peak_memory, peak_memory
from netslim.train.optim import FitConfig, learning_rate, travel
from netslim.train.prepared import Prepared
from netslim.train.ranks import Runtime, freeze
from netslim.train.record import Leg, Record
from netslim.train.saved import Progress, Saver
from netslim.train.sparsity import SparsityConfig, describe_pull, gamma_summary


def fit(
    model: nn.Module,
    train: TrainBatches,
    test: TestBatches,
    config: FitConfig,
    *,
    run: Runtime,
    record: Record,
    gammas: Sequence[nn.Parameter] = (),
    sparsity: SparsityConfig | None = None,
    saver: Saver | None = None,
    slimming: Slimming | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place, on all ranks, and return the metrics of the last epoch (the same on every rank).

    With ``sparsity`` the given ``gammas`` (parameters of ``model``) are penalised. With a ``saver`` training goes on
    from its newest checkpoint, and leaves new ones. Afterwards the model is unwrapped, its BatchNorm statistics
    reconciled, weights and buffers bitwise equal on all ranks. With ``slimming`` that holds of the network which it has
    made of the model.
    Raises FloatingPointError naming step and rank where a loss or gradient is not finite, and ``config`` does not
    allow to leave the step out; the weights are then those of the step before. Raises Preempted, after a checkpoint,
    where a signal asks to stop.
    """
    training = Training(model, train, config, run, record, gammas, sparsity, slimming)
    saver = saver or Saver(None, run)
    try:
        progress = saver.resume(training) or Progress()
        while progress.epoch < config.epochs:
            with run.at(f"epoch {progress.epoch + 1}"):
                training.train_epoch(progress, saver)
                training.finish_epoch(progress, evaluate_on=test)
                training.slim(progress)
            saver.after_epoch(training, progress)
        saver.settle()
    finally:
        saver.close()
    training.bring_back()
    training.restore_layers()
    run.release()
    run.check_equal(training.model, f"after {record.stage}")
    return progress.metrics[-1]


class Training(Prepared):
    """What one `fit` does with a model: steps, and the end of each epoch."""

    def __init__(
        self,
        model: nn.Module,
        train: TrainBatches,
        config: FitConfig,
        run: Runtime,
        record: Record,
        gammas: Sequence[nn.Parameter],
        sparsity: SparsityConfig | None,
        slimming: Slimming | None = None,
    ) -> None:
        run.reseed()  # so that a stage does not depend on whether those before it ran in the same process
        self.train, self.record = train, record
        self.steps_per_epoch = len(train) // run.config.accumulation
        self.changing: list[Tensor] = []
        """Statistics and sums, which a step changes even if it is left out; empty where none may be."""
        self.before_step: list[Tensor] = []
        super().__init__(model, config, run, gammas, sparsity, slimming)
        if sparsity is not None:
            frozen = sum(not gamma.requires_grad for gamma in gammas)
            if frozen:
                record.say(
                    f"{frozen} of {len(gammas)} layers of gammas are frozen: they are not penalised and stay as they "
                    "are; set requires_grad to slim them too",
                    warning=True,
                )
            line, is_warning = describe_pull(gammas, sparsity.weight, travel(config, self.steps_per_epoch))
            record.say(line, warning=is_warning)

    def train_epoch(self, progress: Progress, saver: Saver) -> None:
        """Take the steps of the epoch that are left."""
        run, parts, epoch = self.run, self.run.config.accumulation, progress.epoch
        first = progress.step * parts
        self.waits = Waits(self.train.epoch(epoch, first))
        shown = self.record.progress(self.waits, self.leg(epoch, first))
        forget_peak_memory(run.device)
        sums = progress.start_sums(run.device)
        self.make_ready(sums)
        for index, batch in enumerate(shown, first):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(progress)
            with run.accumulate(self.wrapped) as is_boundary:
                loss = self.forward_backward(batch, sums)
                if is_boundary:
                    if self.config.clip is not None:
                        run.clip_gradients(self.wrapped, self.config.clip)
                    self.refusals.look(loss)
                self.stepper.step()  # does nothing, like zero_grad, before the boundary
                self.stepper.zero_grad()
            if (index + 1) % parts == 0:
                progress.step += 1
                if self.changing or run.may_wait(self.step_number(progress)):
                    self.confirm(progress)
                if progress.step < self.steps_per_epoch and self.slim(progress):
                    self.make_ready(sums)
                if self.changing:  # after slim, which changes statistics even where nothing can go
                    torch._foreach_copy_(self.before_step, self.changing)
                saver.after_step(self, progress)

    def make_ready(self, sums: Tensor) -> None:
        """Put the layers into the mode in which they train, and keep what a step that is left out must not change."""
        self.trained.train()
        if self.run.config.batch_norm == "frozen":
            freeze(self.trained)
        if self.config.skip_nonfinite:
            self.changing = [*self.trained.buffers(), sums]
            self.before_step = [value.clone() for value in self.changing]

    def leg(self, epoch: int, first: int) -> Leg:
        """The epoch as a part of the whole training, for the bar; counted in this rank's micro-batches."""
        num = len(self.train)
        return Leg(
            what=f"epoch {epoch + 1}/{self.config.epochs}",
            total=num,
            first=first,
            before=epoch * num,
            way=self.config.epochs * num,
            parts=self.run.config.accumulation,
            images=lambda batch: len(batch[1]) * self.run.world_size,
        )

    def forward_backward(self, batch: Batch, sums: Tensor) -> Tensor:
        images, labels = batch
        loss, logits = self.forward(images, labels)
        self.run.backward(loss)
        # kept on the device: to read a number here would make every step wait for the GPU
        sums[0] += loss.detach() * len(labels)
        sums[1] += (logits.detach().argmax(1) == labels).sum()
        sums[2] += len(labels)
        return loss.detach()

    def confirm(self, progress: Progress) -> None:
        """Make sure that the steps so far were taken; every rank finds alike, because gradients were added over ranks.

        Where the last may be left out, statistics and sums are again what they were before it.
        """
        refused = self.refusals.count()
        if not refused:
            return
        rank = self.run.first_rank_with(~self.refusals.loss_was_finite)
        what = "the gradient is" if rank is None else f"the loss of rank {rank} is"
        step = self.step_number(progress) - refused + 1
        where = f"{what} not finite at step {step} (epoch {progress.epoch + 1})"
        if progress.skipped == self.config.skip_nonfinite:
            skipped = f" after {progress.skipped} that were left out" if progress.skipped else ""
            error = FloatingPointError(
                f"{self.record.stage}: {where}{skipped}; no rank applied the step. "
                f"Use a lower learning rate (now {self.config.lr:g}), a warm-up, or clipping"
            )
            raise self.run.together(error)
        self.refusals.forget()
        progress.skipped += 1
        torch._foreach_copy_(self.changing, self.before_step)
        allowed = f"{progress.skipped} of {self.config.skip_nonfinite} allowed"
        self.record.say(f"{where}; every rank leaves the step out ({allowed})", warning=True)

    def slim(self, progress: Progress) -> bool:
        """Where it is time, remove the channels that have come to zero; the schedule and the data go on.

        Returns whether any went.
        """
        slimming, step = self.slimming, self.step_number(progress)
        if slimming is None or step == self.config.epochs * self.steps_per_epoch:
            return False
        if not slimming.is_due(step, self.steps_per_epoch):
            return False
        if progress.step:  # else the epoch's end has seen to it
            self.confirm(progress)
            self.bring_together()
        smaller = slimming.shrink(self.model, self.masters.momenta(), step)
        if smaller is None:
            return False
        model, momenta = smaller
        self.exchange(model, slimming.gammas(), momenta)
        epochs = step / self.steps_per_epoch
        self.record.say(f"{slimming.num_gone} channels are gone for good, after {epochs:.4g} epochs")
        return True

    def finish_epoch(self, progress: Progress, evaluate_on: TestBatches) -> None:
        """Add up the ranks' sums, evaluate, and note the epoch's metrics."""
        run = self.run
        self.confirm(progress)
        loss_sum, correct, count = run.sum_over_ranks(progress.start_sums(run.device)).tolist()
        seconds = progress.seconds_so_far()
        if not math.isfinite(loss_sum):  # under a loss scaler, which skips such steps itself
            error = FloatingPointError(
                f"{self.record.stage}: the training loss of epoch {progress.epoch + 1} is {loss_sum}; use a lower "
                f"learning rate (now {self.config.lr:g}), a warm-up, or clipping"
            )
            raise run.together(error)
        self.bring_together()
        run.check_equal(self.model, f"{self.record.stage}, epoch {progress.epoch + 1}")
        evaluation = evaluate(self.model, evaluate_on, run)
        metrics = {
            "epoch": progress.epoch + 1,
            "step": self.step_number(progress),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss_sum / count,
            "train_accuracy": correct / count,
            "test_loss": evaluation.loss,
            "accuracy": evaluation.accuracy,
            "best_accuracy": max([evaluation.accuracy, *(line["accuracy"] for line in progress.metrics)]),
            **_best({"train_loss": loss_sum / count, "test_loss": evaluation.loss}, progress.metrics),
            "images_per_second": count / seconds,
            "data_wait": self.waits.share(seconds - progress.seconds),  # of this process's part of the epoch
            **peak_memory(run.device),
            "seconds": progress.seconds_so_far(),
            "checkpoint_seconds": progress.saving_seconds,
            "skipped_steps": progress.skipped,
            **(self.gammas_now(self.step_number(progress)) if self.gammas else {}),
        }
        progress.next_epoch(metrics)
        self.record.epoch(metrics, self.model, of=self.config.epochs)

    def gammas_now(self, step: int) -> dict[str, float]:
        """How far the gammas are; those of channels that are gone are 0."""
        gone = torch.zeros(0 if self.slimming is None else self.slimming.num_gone, device=self.run.device)
        found = gamma_summary([*self.gammas, gone])
        return found if self.slimming is None else {**found, **self.slimming.metrics(step)}

    def step_number(self, progress: Progress) -> int:
        """Optimizer steps that were done since the beginning."""
        return progress.epoch * self.steps_per_epoch + progress.step

    def learning_rate(self, progress: Progress) -> float:
        return learning_rate(self.step_number(progress), steps_per_epoch=self.steps_per_epoch, config=self.config)


def _best(losses: dict[str, float], earlier: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The least of each loss in the epochs so far."""
    return {
        # a checkpoint need not hold them
        f"best_{name}": min([loss, *(line[name] for line in earlier if isinstance(line.get(name), float))])
        for name, loss in losses.items()
    }
