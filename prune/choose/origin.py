"""Where a network came from: what a plan says about how to build it again, and what it may not say."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import nn

from netslim.base import complaint, plainly, said, split_function

TRUSTED = ("netslim", "torchvision.models")
"""Packages whose functions may be given more than a number of classes."""


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Origin:
    """The function that builds the original network, and what it is called with.

    A plan file may come from a stranger, so it can run nothing but a function that is already importable here, and not
    one of Python's own library. Functions of netslim and `torchvision.models` are called with name, width and
    num_classes, those that are given; any other, the user's own, with num_classes alone, for what a name does there
    nobody knows (`ctypes.CDLL` takes one, and runs what it names). What comes back has to be a module.

    Raises: ValueError for a function that is not "module:function" or that may not be called like this.
    """

    function: str
    """module:function"""
    name: str | None = None
    width: Annotated[float, Field(gt=0)] | None = None
    num_classes: Annotated[int, Field(ge=1)]

    def __post_init__(self) -> None:
        module, _ = split_function(self.function)
        if len(self._arguments) > 1:
            self._check_trust(module)

    def build(self) -> nn.Module:
        """Build the original network, on the CPU; torch's random numbers go on as if it had not been built.

        Raises: ValueError, in one line that names the function, whatever goes wrong.
        """
        function = self._find()
        try:
            with torch.random.fork_rng(devices=[]):
                model = function(**self._arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ValueError(f"{self.function}({self._call}) raised {said(error)}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.function} returned {type(model).__name__}, not a torch.nn.Module")
        return model

    def to_json(self) -> str:
        """Write it as JSON."""
        return json.dumps({"function": self.function, **self._arguments}, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """Read what `to_json` wrote; ValueError, in one line, on any fault."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise ValueError(f"not an origin: {complaint(error)}") from None

    @property
    def _arguments(self) -> dict[str, Any]:
        given = {"name": self.name, "width": self.width, "num_classes": self.num_classes}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def _call(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self._arguments.items())

    def _find(self) -> Callable[..., object]:
        """Import the function, and see that it takes the arguments before it is called."""
        module, name = split_function(self.function)
        try:
            function: Callable[..., object] = getattr(importlib.import_module(module), name)
            inspect.signature(function).bind(**self._arguments)
        except (Exception, SystemExit) as error:  # importing runs the module's own code
            raise ValueError(f"{self.function}({self._call}) cannot be called: {said(error)}") from error
        if len(self._arguments) > 1:
            self._check_trust(str(function.__module__))  # netslim's modules have functions of others in them, imported
        return function

    def _check_trust(self, module: str) -> None:
        if not any(f"{module}.".startswith(f"{package}.") for package in TRUSTED):
            raise ValueError(
                f"{self.function} is of {module}, and may be given num_classes alone; "
                f"name and width are for {' and '.join(TRUSTED)}"
            )
