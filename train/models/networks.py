"""Networks by name: those of the slimming literature for CIFAR, any torchvision classifier, and a user's own."""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.train.models.densenet import DenseNet
from netslim.train.models.own import build_own, is_own
from netslim.train.models.preresnet import PreResNet
from netslim.train.models.vgg import LAYERS, VGG


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ModelConfig:
    name: str = "vgg19"
    """vgg11|13|16|19, preresnet20|56|110|164, densenet40, any torchvision classifier, or your own: module:function."""
    width: Annotated[float, Field(gt=0, le=16)] = 1.0
    """Factor on the number of channels of every layer (not for torchvision's networks or your own)."""
    initial_gamma: Annotated[float, Field(gt=0)] | None = 0.5
    """Scale that every BatchNorm starts from (Liu et al. 2017 use 0.5); None leaves the network's own."""


_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"vgg{depth}": partial(VGG, depth) for depth in LAYERS},
    **{f"preresnet{depth}": partial(PreResNet, depth) for depth in (20, 56, 110, 164)},
    "densenet40": partial(DenseNet, 40),
}


def model_names() -> list[str]:
    """Every name that ``build_model`` knows; where torchvision has the same name, the CIFAR form is meant."""
    from torchvision import models  # here, as below: a third of the seconds that a process needs to start

    return sorted({*_NETWORKS, *models.list_models(module=models)})


def build_model(config: ModelConfig, num_classes: int, seed: int) -> nn.Module:
    """Build a newly initialised network, the same on every rank: its weights are a function of the seed alone.

    Raises ValueError for an unknown name (naming the nearest), for a width that the network does not have, and for
    whatever goes wrong in a user's own function.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_own(config.name):
            _check_width(config.name, config.width)
            model = build_own(config.name, num_classes)
        else:
            model = make_network(config.name, num_classes, config.width)
    _set_gammas(model, config)
    return model


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initialise a network anew, in place, as a function of the seed: for one cut out of a wider one.

    The layers' own initialisation, then the one of `build_model`; what a cut took over from a wider network has the
    wrong scale.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        _initialise(model)
    _set_gammas(model, config)


def make_network(name: str, num_classes: int, width: float) -> nn.Module:
    """Make one of ``model_names()`` with random weights; raises ValueError for a name or width it does not have."""
    _check_network(name, width)
    make = _NETWORKS.get(name)
    if make is None:
        from torchvision import models

        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        return network
    model = make(num_classes=num_classes, width=width)
    _initialise(model)
    return model


def check_model(config: ModelConfig) -> None:
    """Raise ValueError where ``build_model`` would; only a user's own function is called for it."""
    if is_own(config.name):
        build_model(config, num_classes=10, seed=0)
    else:
        _check_network(config.name, config.width)


def _check_network(name: str, width: float) -> None:
    if name in _NETWORKS:
        return
    names = model_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        raise ValueError(f"no model is called {name!r}; the nearest are {', '.join(nearest) or ', '.join(_NETWORKS)}")
    _check_width(name, width)


def _check_width(name: str, width: float) -> None:
    if width != 1.0:
        raise ValueError(f"model.width {width} is only for {', '.join(_NETWORKS)}; {name} needs model.width 1")


def _set_gammas(model: nn.Module, config: ModelConfig) -> None:
    if config.initial_gamma is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                nn.init.constant_(module.weight, config.initial_gamma)


def _initialise(model: nn.Module) -> None:
    """He initialisation by fan-out for convolutions (arXiv 1502.01852), small normal weights for the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
