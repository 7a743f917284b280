"""Exact accuracy over ranks: every test image is counted once, whatever the number of processes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netslim.train.ranks import Runtime


@dataclass(frozen=True)
class Evaluation:
    """Counts over the whole test split; the same on every rank."""

    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of test images that the network classifies correctly, in [0, 1]."""
        return self.correct / self.total


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], run: Runtime, *, alone: bool = False
) -> Evaluation:
    """Classify this rank's share of the test images and add the counts of all ranks.

    ``batches`` yields images (n, 3, height, width) and labels (n,); the shares of the ranks are disjoint and together
    the whole split. With ``alone`` they are this rank's own split, and no other rank is asked. The model is used in
    eval mode; afterwards each of its modules is in the mode it was in.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # float64 holds counts exactly up to 2**53, and one all-reduce serves all three
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    with run.at("evaluation"):
        try:
            for images, labels in batches:
                with run.autocast():
                    logits = model(images)
                logits = logits.float()
                sums[0] += (logits.argmax(1) == labels).sum()
                sums[1] += len(labels)
                sums[2] += F.cross_entropy(logits, labels, reduction="sum")
        finally:
            for module, mode in modes:
                module.training = mode
        correct, total, loss = (sums if alone else run.sum_over_ranks(sums)).tolist()
    assert total > 0, "loaders refuse an empty test split"
    return Evaluation(int(correct), int(total), loss / total)
