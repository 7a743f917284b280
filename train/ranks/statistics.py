"""BatchNorm statistics over ranks: how layers take them while they train, and how those of several become one."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze(model: nn.Module) -> None:
    """Normalise by the running statistics, and leave them as they are."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def synchronise(model: nn.Module) -> Callable[[], None]:
    """Normalise by the images of all ranks (torch's SyncBatchNorm, on GPUs), until the function returned is called.

    The layers are exchanged; those before keep their place in memory, share every tensor, and are put back.
    """
    exchanged = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, _BatchNorm)
    ]
    for parent, name, layer in exchanged:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(layer))  # type: ignore[no-untyped-call]

    def put_back() -> None:
        for parent, name, layer in exchanged:
            layer.train(getattr(parent, name).training)
            setattr(parent, name, layer)

    return put_back


@torch.no_grad()
def reconcile(model: nn.Module, average: Callable[[Tensor], Tensor]) -> None:
    """Give every rank the BatchNorm statistics of all ranks' images together.

    ``average`` gives the mean over ranks of a float64 tensor, in one message. Ranks see equal numbers of images, so
    that their moments weigh alike.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return
    means = torch.cat([_double(layer.running_mean) for layer in layers])
    variances = torch.cat([_double(layer.running_var) for layer in layers])
    mean, variance = _of_moments(average(_moments(means, variances)))
    sizes = [layer.num_features for layer in layers]
    for layer, m, v in zip(layers, torch.split(mean, sizes), torch.split(variance, sizes), strict=True):
        layer.running_mean.copy_(m)  # type: ignore[union-attr]
        layer.running_var.copy_(v)  # type: ignore[union-attr]


def combined(ranks: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make the buffers of several ranks those of one: BatchNorm statistics of all their images, rank 0's others."""
    ranks = list(ranks)
    found = dict(ranks[0])
    for name in found:
        home, _, own = name.rpartition(".")
        if own == "running_mean":
            variance = f"{home}.running_var" if home else "running_var"
            each = torch.stack([_moments(_double(rank[name]), _double(rank[variance])) for rank in ranks])
            for key, value in zip((name, variance), _of_moments(each.mean(0)), strict=True):
                found[key] = value.to(found[key].dtype)
    return found


def _moments(mean: Tensor, variance: Tensor) -> Tensor:
    """First and second moments, (2, ...): those of several equal shares of images are averaged, variances are not."""
    return torch.stack([mean, variance + mean**2])


def _of_moments(averaged: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of what `_moments`, (2, ...), were averaged over."""
    return averaged[0], averaged[1] - averaged[0] ** 2


def _double(statistic: Tensor | None) -> Tensor:
    assert statistic is not None, "running mean and variance come together"
    return statistic.double()
