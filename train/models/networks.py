"""Networks by name: those of the slimming literature for CIFAR, torchvision's, timm's, and a user's own."""

import difflib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.train.models.config import ModelConfig
from netslim.train.models.densenet import DenseNet
from netslim.train.models.own import build_own, is_own
from netslim.train.models.preresnet import PreResNet
from netslim.train.models.timm_door import build_timm, check_timm, is_timm
from netslim.train.models.vgg import LAYERS, VGG
from netslim.train.models.weights import start_from

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"vgg{depth}": partial(VGG, depth) for depth in LAYERS},
    **{f"preresnet{depth}": partial(PreResNet, depth) for depth in (20, 56, 110, 164)},
    "densenet40": partial(DenseNet, 40),
}


def model_names() -> list[str]:
    """Every name that ``build_model`` knows, besides timm's, ``timm:NAME``, and those of a user's own functions.

    Where torchvision has the same name, the CIFAR form is meant.
    """
    from torchvision import models  # here, as below: a third of the seconds that a process needs to start

    return sorted({*_NETWORKS, *models.list_models(module=models)})


def build_model(
    config: ModelConfig, num_classes: int, seed: int, say: Callable[[str], object] = lambda line: None
) -> nn.Module:
    """Build a network, the same on every rank: its weights are a function of the seed, and of the file they start from.

    ``say`` is given a line of what was taken from the file, or of gammas of a user's own that do not stay.

    Raises ValueError for an unknown name (naming the nearest), for a width that the network does not have, for whatever
    goes wrong in a user's own function, and for weights of another network; FileNotFoundError without their file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_own(config.name):
            _check_width(config.name, config.width)
            model = build_own(config.name, num_classes)
        else:
            model = make_network(config.name, num_classes, config.width)
    if config.weights is not None:
        say(_start(model, config, config.weights, num_classes))
    elif is_own(config.name) and config.initial_gamma == "auto" and (line := _overwritten(model, config)):
        say(line)
    _set_gammas(model, config.first_gamma)
    return model


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> list[str]:
    """Initialise a network anew, in place, as a function of the seed: for one cut out of a wider one.

    The layers' own initialisation, then the one of `build_model`; what a cut took over from a wider network has the
    wrong scale.

    Returns: the names of parameters that keep their values, since no module around them says how they begin.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        homes = []
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                homes.append(f"{name}." if name else "")
        _initialise(model)
    _set_gammas(model, config.anew.first_gamma)
    return [name for name, _ in model.named_parameters() if not name.startswith(tuple(homes))]


def make_network(name: str, num_classes: int, width: float) -> nn.Module:
    """Make one of ``model_names()`` or ``timm:NAME`` with random weights; ValueError for no such name or width."""
    _check_network(name, width)
    if is_timm(name):
        return build_timm(name, num_classes)
    make = _NETWORKS.get(name)
    if make is None:
        from torchvision import models

        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        return network
    model = make(num_classes=num_classes, width=width)
    _initialise(model)
    return model


def check_model(config: ModelConfig, num_classes: int | None = None) -> None:
    """Raise ValueError where ``build_model`` would; only a user's own function is called for it, and weights are read.

    Without ``num_classes``, where they are not known yet, any classifier of the weights will do.
    """
    if config.weights is not None:
        compared = config if num_classes else replace(config, weights_head="new")
        build_model(compared, num_classes or 10, seed=0)
    elif is_own(config.name):
        build_model(config, num_classes=10, seed=0)
    else:
        _check_network(config.name, config.width)


def _check_network(name: str, width: float) -> None:
    if name in _NETWORKS:
        return
    if is_timm(name):
        _check_width(name, width)
        check_timm(name)
        return
    names = model_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        known = ", ".join(nearest or _NETWORKS)
        raise ValueError(f"no model is called {name!r}; the nearest are {known}; timm's are timm:NAME")
    _check_width(name, width)


def _check_width(name: str, width: float) -> None:
    if width != 1.0:
        raise ValueError(f"model.width {width} is only for {', '.join(_NETWORKS)}; {name} needs model.width 1")


def _start(model: nn.Module, config: ModelConfig, path: Path, num_classes: int) -> str:
    new_head, sha256 = config.weights_head == "new", config.weights_sha256
    line = start_from(model, path, num_classes, new_head=new_head, sha256=sha256)
    gamma = config.first_gamma
    return line if gamma is None else f"{line}; every gamma starts from model.initial_gamma {gamma:g} all the same"


def _overwritten(model: nn.Module, config: ModelConfig) -> str:
    """Say how many BatchNorms of a user's own network lose gammas that are not those of new ones; nothing if none."""
    scales = [module.weight for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
    trained = sum(bool((scale != 1).any()) for scale in scales)
    if not trained:
        return ""
    return (
        f"model.initial_gamma auto sets the gammas of {trained} of {len(scales)} BatchNorms, to which {config.name} "
        f"gave others than 1, to {config.first_gamma:g}; --model.initial-gamma None keeps them"
    )


def _set_gammas(model: nn.Module, gamma: float | None) -> None:
    if gamma is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                nn.init.constant_(module.weight, gamma)


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
