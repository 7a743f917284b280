"""Networks by name: the CIFAR networks of the slimming literature, and any torchvision classifier."""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torchvision
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.train.models.densenet import DenseNet
from netslim.train.models.preresnet import PreResNet
from netslim.train.models.vgg import LAYERS, VGG

__all__ = ["VGG", "DenseNet", "ModelConfig", "PreResNet", "build_model", "model_names"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ModelConfig:
    name: str = "vgg19"
    """vgg11|13|16|19, preresnet20|56|110|164, densenet40, or the name of any torchvision classifier."""
    width: Annotated[float, Field(gt=0, le=16)] = 1.0
    """Factor on the number of channels of every layer (not for torchvision's networks)."""
    initial_gamma: Annotated[float, Field(gt=0)] | None = 0.5
    """Scale that every BatchNorm starts from (Liu et al. 2017 use 0.5); None leaves the network's own."""


_OWN: dict[str, Callable[..., nn.Module]] = {
    **{f"vgg{depth}": partial(VGG, depth) for depth in LAYERS},
    **{f"preresnet{depth}": partial(PreResNet, depth) for depth in (20, 56, 110, 164)},
    "densenet40": partial(DenseNet, 40),
}


def model_names() -> list[str]:
    """Every name that ``build_model`` knows; where torchvision has the same name, the CIFAR form is meant."""
    return sorted({*_OWN, *torchvision.models.list_models(module=torchvision.models)})


def build_model(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    """Build a newly initialised network, the same on every rank: its weights are a function of the seed alone.

    Raises ValueError for an unknown name (naming the nearest), and for a width that the network does not have.
    """
    check_model(config)
    own = _OWN.get(config.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if own is not None:
            model = own(num_classes=num_classes, width=config.width)
            _initialise(model)
        else:
            model = torchvision.models.get_model(config.name, weights=None, num_classes=num_classes)
    if config.initial_gamma is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                nn.init.constant_(module.weight, config.initial_gamma)
    return model


def check_model(config: ModelConfig) -> None:
    """Raise ValueError where ``build_model`` would, without building anything."""
    names = model_names()
    if config.name not in names:
        nearest = difflib.get_close_matches(config.name, names, n=3, cutoff=0.3)
        raise ValueError(f"no model is called {config.name!r}; the nearest are {', '.join(nearest) or ', '.join(_OWN)}")
    if config.name not in _OWN and config.width != 1.0:
        raise ValueError(f"model.width {config.width} is only for {', '.join(_OWN)}; {config.name} needs model.width 1")


def _initialise(model: nn.Module) -> None:
    """He initialisation by fan-out for convolutions (arXiv 1502.01852), small normal weights for the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
