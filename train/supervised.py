"""The model with its loss, as the engine wraps it."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.nn import functional as F


class Supervised(nn.Module):
    """The model with its loss: what the engine wraps, so that the model itself is never patched.

    ``forward`` takes images (n, 3, height, width) and labels (n,) and returns the mean loss and the logits.
    """

    def __init__(
        self, model: nn.Module, label_smoothing: float, autocast: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__()
        self.model, self.label_smoothing, self.autocast = model, label_smoothing, autocast

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            return self._loss_and_logits(images, labels)

    def _loss_and_logits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(images)
        if isinstance(outputs, Tensor):
            logits, auxiliary = outputs, []
        else:  # a network with auxiliary classifiers returns (logits, auxiliary, ...) while training
            logits, *auxiliary = [output for output in outputs if output is not None]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        for output in auxiliary:  # weight 0.3: Szegedy et al. 2015, section 5, arXiv 1409.4842
            loss = loss + 0.3 * F.cross_entropy(output, labels, label_smoothing=self.label_smoothing)
        return loss, logits
