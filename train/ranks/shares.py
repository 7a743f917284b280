"""How many images each BatchNorm normalises by while it trains, said before it does."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.train.ranks.engine import EngineConfig

_FEWEST = 16
"""Images below which the statistics of a batch are too noisy (Wu and He 2018, arXiv 1803.08494, figure 1)."""


def few_images(batch_size: int, ranks: int, config: EngineConfig) -> str | None:
    """Say in one line that BatchNorms would normalise by fewer than 16 images, and what helps; None if they would not.

    ``batch_size`` images are shared by so many ranks, and taken in the accumulation steps that the engine says.
    """
    num, shared = _images(batch_size, ranks, config)
    if num is None or num >= _FEWEST:
        return None
    fewer = [n for n in range(1, ranks) if not batch_size % (n * config.accumulation)]
    fewer = [n for n in fewer if (_images(batch_size, n, config)[0] or 0) >= _FEWEST]
    remedies = [f"fewer processes (--num-processes {fewer[-1]})"] if fewer else []
    if config.batch_norm == "local" and ranks > 1:
        remedies.append("on GPUs --engine.batch-norm sync")
    if config.accumulation > 1:
        remedies.append("fewer steps of --engine.accumulation")
    remedies.append(f"a larger batch (--data.batch-size {_FEWEST * batch_size // num})")
    return (
        f"each BatchNorm normalises by {num} image{'s' * (num > 1)} ({shared}), and fewer than {_FEWEST} make its "
        f"statistics noisy; use {', '.join(remedies[:-1])}{' or ' * (len(remedies) > 1)}{remedies[-1]}"
    )


def check_values(model: nn.Module, image: Tensor, batch_size: int, ranks: int, config: EngineConfig) -> None:
    """Raise ValueError where a BatchNorm would get one value for each channel to normalise by, which it cannot.

    So it is with one image for each rank and step, behind a pooling to one place or in a BatchNorm1d. ``image``
    (1, 3, height, width): of its values nothing depends. The model is unchanged.
    """
    num, shared = _images(batch_size, ranks, config)
    if num != 1:
        return
    names = _without_places(model, image)
    if names:
        parts = batch_size  # one image in each
        raise ValueError(
            f"BatchNorm {names[0]!r} would normalise by one image ({shared}), of which it sees one value for each "
            f"channel; use at least --data.batch-size {2 * parts}, or fewer processes"
        )


def _images(batch_size: int, ranks: int, config: EngineConfig) -> tuple[int | None, str]:
    """Images that a BatchNorm normalises by, None where it takes running statistics; and how they come about."""
    shared = f"batch {batch_size}"
    if config.batch_norm == "local" and ranks > 1:
        shared += f" over {ranks} processes"
    if config.accumulation > 1:
        shared += f" in {config.accumulation} accumulation steps"
    if config.batch_norm == "frozen":
        return None, shared
    parts = config.accumulation * (ranks if config.batch_norm == "local" else 1)
    return max(1, batch_size // parts), shared


@torch.no_grad()
def _without_places(model: nn.Module, image: Tensor) -> list[str]:
    """Name the BatchNorms that see one value for each channel of an image, in the order of execution."""
    twin = copy.deepcopy(model).train()
    found: list[str] = []
    for name, module in twin.named_modules():
        if isinstance(module, _BatchNorm):

            def look(norm: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                normalises = norm.training or getattr(norm, "running_mean", None) is None
                if normalises and inputs[0].numel() == 2 * inputs[0].shape[1]:
                    found.append(name)

            module.register_forward_pre_hook(look)
    devices = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            twin(image.expand(2, *image.shape[1:]))
        except Exception:  # the network's own code: what it cannot do is said where it trains
            return []
    return found
