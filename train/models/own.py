"""A user's own network: found by the name of the function that builds it, and called with the number of classes."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from torch import nn

from netslim.base import said, split_function
from netslim.train.models.timm_door import is_timm


def is_own(name: str) -> bool:
    """Whether a model's name is a user's function, as in ``mypkg.nets:build``, and not a network of ours."""
    return ":" in name and not is_timm(name)


def build_own(name: str, num_classes: int) -> nn.Module:
    """Call ``function(num_classes=...)`` for a name ``module:function``; the current directory counts for the import.

    Raises ValueError in one line that names the function: where it is not found, raises, or returns no module.
    """
    function = _find(name)
    _check_signature(name, function)
    try:
        model = function(num_classes=num_classes)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ValueError(f"model {name}(num_classes={num_classes}) raised {said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _find(name: str) -> Callable[..., object]:
    try:
        path, attribute = split_function(name)
    except ValueError as error:
        raise ValueError(f"model {error}") from None
    directory = os.getcwd()
    if directory not in sys.path:  # `python -m` has it there, console scripts have not
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise ValueError(f"model {name}: no module {error.name!r} in {directory} or installed") from error
        raise ValueError(f"model {name}: importing {path} raised {said(error)}") from error
    function: object = getattr(module, attribute, None)
    if function is None:
        raise ValueError(f"model {name}: there is no {attribute!r} in {module.__file__}")
    if not callable(function):
        raise ValueError(f"model {name} is {type(function).__name__}, not a function")
    return function


def _check_signature(name: str, function: Callable[..., object]) -> None:
    try:
        inspect.signature(function).bind(num_classes=10)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model {name} is called with num_classes=... alone, and cannot be: {error}") from error
