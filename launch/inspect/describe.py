"""What can be slimmed in a network, before any training: the channel map of a preset, or of a run, and the pull."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from netslim.data import open_source
from netslim.launch.config import RunConfig
from netslim.prune import ChannelMap, cautions, foreseen, map_channels, open_gammas
from netslim.train import build_model, describe_pull, few_images, num_gpus, travel


def describe(config: RunConfig, *, is_trained: bool = False) -> str:
    """Describe the channels of the configuration's network: who shares them, which can go, and why others stay.

    Before sparsity training also whether that can bring the gammas to zero, if the images are at hand. It needs no
    process group. The network is built for 10 classes: the outputs of the last layer stay in any case, so their number
    changes nothing in the map.
    """
    size, coupling = config.data.size, config.prune.coupling
    model = build_first(config, is_trained=is_trained)
    channels = map_first(config, model)
    lines = [f"{config.model.name} on images of {size}x{size}", channels.table()]
    if coupling == "select":
        lines.append(channels.count(coupling))
    lines += [f"warning: {line}" for line in cautions(model, channels, coupling)]
    try:
        num_images, missing = len(open_source(replace(config.data, download=False)).train), ""
    except (ValueError, OSError) as error:
        num_images, missing = 0, str(error)
    if num_images and config.repair.steps:
        by = min(num_images, config.repair.images)
        lines += [f"warning: {line}" for line in foreseen(model, torch.zeros(1, 3, size, size), by)]
    if not is_trained:
        images = few_images(config.data.batch_size, _num_processes(config), config.engine)
        lines += [f"warning: {images}"] if images else []
        gammas = open_gammas(model, channels, config.prune.rules)
        unknown = f"whether lambda can bring the gammas to zero depends on the number of training images: {missing}"
        lines += ["", predict_pull(config, gammas, num_images) if num_images else unknown]
    return "\n".join(lines)


def build_first(config: RunConfig, *, is_trained: bool = False, num_classes: int = 10) -> nn.Module:
    """The network that sparsity training starts from, with whatever classifier the number of classes asks for."""
    start = config.model
    if start.weights is not None:  # of which a trained run needs none, and any classifier will do
        start = start.anew if is_trained else replace(start, weights_head="new")
    return build_model(start, num_classes=num_classes, seed=config.seed)


def map_first(config: RunConfig, model: nn.Module) -> ChannelMap:
    """Its channel map; raises ValueError where nothing can go."""
    size = config.data.size
    return map_channels(model, torch.zeros(1, 3, size, size), config.prune.coupling)


def _num_processes(config: RunConfig) -> int:
    """How many processes a run would have here, whether or not this machine can have so many."""
    return config.num_processes or (1 if config.cpu else max(1, num_gpus()))


def predict_pull(config: RunConfig, gammas: Sequence[Tensor], num_images: int) -> str:
    """Whether the schedule can bring these gammas to zero with so many training images, in one line."""
    line, is_warning = describe_pull(
        gammas, config.sparsity.weight, travel(config.sparsify, num_images // config.data.batch_size)
    )
    return f"{'warning: ' * is_warning}{line}"
