"""The record of a network: what one run of its forward called, on which parameters, in which order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True, frozen=True)
class Call:
    """One call of a torch function. Values are numbered in the order in which they come up; a write makes a new one."""

    name: str
    """As in `name_of`."""
    inputs: tuple[int, ...]
    """The tensors among its arguments."""
    outputs: tuple[int, ...]
    home: str
    """The module in whose forward it was called; empty = the network's own."""


@dataclass(slots=True, frozen=True)
class Passage:
    """One call of a module: the tensors that went in and came out, and the module in whose forward it was called."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    home: str
    tells: bool
    """Whether it returned a number or a word too."""


Course = tuple[list[Call], tuple[int, ...]]


@dataclass(slots=True)
class Record:
    """What one run of a network's forward called."""

    calls: list[Call] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    """Value -> the parameter or buffer that it is."""
    passages: defaultdict[str, list[Passage]] = field(default_factory=lambda: defaultdict(list))
    """Module -> its calls."""
    results: tuple[int, ...] = ()
    """The tensors that the network returned."""

    @property
    def course(self) -> Course:
        """What tells two runs apart: the calls, and the tensors returned."""
        return self.calls, self.results


def parts_of(value: Any, kind: type[Any]) -> list[Any]:
    """List what is of a kind in the arguments of a call, or in its result: alone, in lists, dictionaries or slices."""
    found: list[Any] = []
    _collect(value, kind, found, None)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """List the tensors among the arguments of a call, or in its result."""
    return parts_of(value, Tensor)


def results_of(value: Any) -> list[Tensor]:
    """List the tensors in what a network returns, also those that objects hold."""
    found: list[Tensor] = []
    _collect(value, Tensor, found, set())
    return found


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Copy the arguments of a call with every part changed that is no list, dictionary or slice."""
    if isinstance(value, (tuple, list)):
        parts = [mapped(part, change) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, Mapping):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(part, change) for part in (value.start, value.stop, value.step)))
    return change(value)


def has_others(value: Any) -> bool:
    """Tell whether a result holds more than tensors: numbers, words, objects."""
    if isinstance(value, (tuple, list)):
        return any(map(has_others, value))
    if isinstance(value, Mapping):
        return any(map(has_others, value.values()))
    return value is not None and not isinstance(value, Tensor)


_ATOMS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))


def _collect(value: Any, kind: type[Any], found: list[Any], seen: set[int] | None) -> None:
    if type(value) in _ATOMS:  # of most arguments this is known fastest
        return
    if isinstance(value, kind):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for part in value:
            _collect(part, kind, found, seen)
    elif isinstance(value, Mapping):
        for part in value.values():
            _collect(part, kind, found, seen)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), kind, found, seen)
    elif seen is not None and isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        _collect(list(value), kind, found, seen)
    elif seen is not None and is_dataclass(value):
        _collect([getattr(value, each.name) for each in fields(value)], kind, found, seen)
    elif seen is not None and not isinstance(value, (type, nn.Module)) and id(value) not in seen:
        seen.add(id(value))
        _collect(getattr(value, "__dict__", ()), kind, found, seen)
