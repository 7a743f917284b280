"""The only door to timm: its networks by name, and never their weights, which it would download."""

import difflib
import importlib
from typing import Any

from torch import nn

from netslim.base import said

PREFIX = "timm:"


def is_timm(name: str) -> bool:
    """Whether a model's name is one of timm's, as in ``timm:resnet50d``."""
    return name.startswith(PREFIX)


def check_timm(name: str) -> None:
    """Raise ValueError for a name that timm does not have, naming the nearest, and where timm is not installed."""
    timm = _timm(name)
    names = {*timm.list_models(), *timm.list_pretrained()}  # with tags, as in resnet50.a1_in1k
    # names alone: timm would fetch what `hf-hub:` and the like stand for
    if name.removeprefix(PREFIX) not in names:
        nearest = difflib.get_close_matches(name.removeprefix(PREFIX), sorted(names), n=3, cutoff=0.3)
        known = ", ".join(f"{PREFIX}{each}" for each in nearest) or "those of timm.list_models()"
        raise ValueError(f"no model is called {name!r}; the nearest are {known}")


def build_timm(name: str, num_classes: int) -> nn.Module:
    """Build a network of timm with random weights; raises ValueError in one line, also for what goes wrong in it."""
    check_timm(name)
    try:
        model: nn.Module = _timm(name).create_model(
            name.removeprefix(PREFIX), pretrained=False, num_classes=num_classes
        )
    except Exception as error:  # some need packages of their own, or cannot do without their classifier
        raise ValueError(f"model {name} with {num_classes} classes raised {said(error)}") from error
    return model


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")  # here: a second that no other network needs
    except ImportError as error:
        raise ValueError(f'model {name} needs timm ({error}); pip install "netslim[timm]"') from error
