"""The only training loop: sparsity training and fine-tuning are the same function with and without a penalty."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.train.evaluate import evaluate
from netslim.train.optim import FitConfig, learning_rate, make_optimizer, travel
from netslim.train.record import Record
from netslim.train.runtime import Runtime
from netslim.train.sparsity import GammaPenalty, SparsityConfig, describe_pull, gamma_summary

Batch = tuple[Tensor, Tensor]


class TrainBatches(Protocol):
    """This rank's training images: ``len`` micro-batches an epoch, in an order that is a function of the epoch."""

    def epoch(self, epoch: int) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class TestBatches(Protocol):
    """This rank's share of the test images, each once."""

    def __iter__(self) -> Iterator[Batch]: ...


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
) -> dict[str, Any]:
    """Train ``model`` in place, on all ranks, and return the metrics of the last epoch (the same on every rank).

    With ``sparsity`` the given ``gammas`` (parameters of ``model``) are penalised. Afterwards the model is unwrapped,
    its BatchNorm statistics reconciled, weights and buffers bitwise equal on all ranks.
    Raises FloatingPointError naming the epoch where the loss is not finite.
    """
    model.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps_per_epoch = len(train) // run.config.accumulation
    optimizer = make_optimizer(model, config)
    if sparsity is not None:
        GammaPenalty(gammas, sparsity.weight, sparsity.method).attach(optimizer)
        line, is_warning = describe_pull(gammas, sparsity.weight, travel(config, steps_per_epoch))
        record.say(line, warning=is_warning)
    wrapped, stepper = run.prepare(Supervised(model, config.label_smoothing), optimizer)
    forward = torch.compile(wrapped) if run.config.compile else wrapped

    def train_epoch(epoch: int) -> Tensor:
        """One pass; returns this rank's sums: loss x images, correct images, images."""
        model.train()
        if run.config.batch_norm == "frozen":
            _freeze_statistics(model)
        sums = torch.zeros(3, dtype=torch.float64, device=run.device)
        batches = record.progress(train.epoch(epoch), len(train), f"epoch {epoch + 1}/{config.epochs}")
        for index, (images, labels) in enumerate(batches):
            step = epoch * steps_per_epoch + index // run.config.accumulation
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps_per_epoch=steps_per_epoch, config=config)
            with run.accumulate(wrapped) as is_boundary:
                loss, logits = forward(images, labels)
                run.backward(loss)
                if is_boundary and config.clip is not None:
                    run.clip_gradients(wrapped, config.clip)
                stepper.step()  # does nothing, like zero_grad, before the boundary
                stepper.zero_grad()
            # kept on the device: to read a number here would make every step wait for the GPU
            sums[0] += loss.detach() * len(labels)
            sums[1] += (logits.detach().argmax(1) == labels).sum()
            sums[2] += len(labels)
        return sums

    metrics: dict[str, Any] = {}
    best = 0.0
    for epoch in range(config.epochs):
        started = time.perf_counter()
        loss_sum, correct, count = run.sum_over_ranks(train_epoch(epoch)).tolist()
        train_seconds = time.perf_counter() - started
        if not math.isfinite(loss_sum):
            raise FloatingPointError(
                f"{record.stage}: the training loss of epoch {epoch + 1} is {loss_sum}; use a lower learning rate "
                f"(now {config.lr:g}), a warm-up, or clipping"
            )
        run.reconcile_statistics(model)
        evaluation = evaluate(model, test, run)
        best = max(best, evaluation.accuracy)
        metrics = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps_per_epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": loss_sum / count,
            "train_accuracy": correct / count,
            "test_loss": evaluation.loss,
            "accuracy": evaluation.accuracy,
            "best_accuracy": best,
            "images_per_second": count / train_seconds,
            "seconds": time.perf_counter() - started,
            **(gamma_summary(gammas) if sparsity is not None else {}),
        }
        record.epoch(metrics, model)
    run.release()
    run.check_equal(model, f"after {record.stage}")
    return metrics


class Supervised(nn.Module):
    """The model with its loss: what the engine wraps, so that the model itself is never patched.

    ``forward`` takes images (n, 3, height, width) and labels (n,) and returns the mean loss and the logits.
    """

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(images)
        if isinstance(outputs, Tensor):
            logits, auxiliary = outputs, []
        else:  # a network with auxiliary classifiers returns (logits, auxiliary, ...) while training
            logits, *auxiliary = [output for output in outputs if output is not None]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        for output in auxiliary:  # weight 0.3: Szegedy et al. 2015, section 5, arXiv 1409.4842
            loss = loss + 0.3 * F.cross_entropy(output, labels, label_smoothing=self.label_smoothing)
        return loss, logits


def _freeze_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
