"""Copies of a network: whole ones, in a fraction of copy.deepcopy's time, and ones without numbers, for shapes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_CONTAINERS = frozenset({dict, OrderedDict, set})


def replica(model: Network, memo: dict[int, Any]) -> Network:
    """Copy a network and all that it holds, except what the memo, as deepcopy's, has for the id of an object.

    Modules are mostly dictionaries of numbers and of further modules; deepcopy's protocol for any object takes ten
    times as long for these. What is neither, and modules that say how they are copied, are left to it.
    """
    try:
        copied: Network = _copied(model, memo)
    except Exception as error:  # copying runs what the user's own objects say
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"the network cannot be copied (copy.deepcopy says: {what})") from error
    return copied


def weightless(model: nn.Module) -> nn.Module:
    """Copy the network onto the meta device, where shapes cost no arithmetic."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return replica(model, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind: Any = type(value)
    if kind in _ATOMS or (kind is tuple and all(type(part) in _ATOMS for part in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in _CONTAINERS and not value:  # most of what a module holds
        memo[id(value)] = made = kind()
        return made
    if kind in (dict, OrderedDict) and all(type(key) in _ATOMS for key in value):
        memo[id(value)] = made = kind()
        for key, part in value.items():
            made[key] = _copied(part, memo)
        return made
    if isinstance(value, nn.Module) and _is_ordinary(kind):
        memo[id(value)] = made = object.__new__(kind)
        state: dict[str, Any] = value.__getstate__()  # type: ignore[no-untyped-call]
        made.__setstate__({name: _copied(part, memo) for name, part in state.items()})
        return made
    if isinstance(value, Tensor) and not value.is_leaf:  # kept of a training step: deepcopy refuses it
        memo[id(value)] = kept = value.detach().clone()
        return kept
    if isinstance(value, FunctionType) and _holds_modules(value, set()):
        return _copied_function(value, memo)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value, memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, open files, generators: one for both
        memo[id(value)] = value
        return value


def _holds_modules(value: Any, seen: set[int]) -> bool:
    """Tell whether a function closes over a module, or over another function that does."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, MethodType):
        return isinstance(value.__self__, nn.Module)
    if isinstance(value, FunctionType):
        return any(_holds_modules(each, seen) for each in _held(value))
    return isinstance(value, nn.Module)


def _held(function: FunctionType) -> list[Any]:
    """List what a function holds: in its closure, and as defaults."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Copy a function with what it holds: a forward put around another one would run the original's."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    memo[id(function)] = made
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        if old != CellType():
            cell.cell_contents = _copied(old.cell_contents, memo)
    made.__defaults__ = _copied(function.__defaults__, memo) if function.__defaults__ else None
    made.__kwdefaults__ = _copied(function.__kwdefaults__, memo) if function.__kwdefaults__ else None
    made.__dict__.update(function.__dict__)
    return made


@cache
def _is_ordinary(kind: Any) -> bool:
    """Tell whether instances are what their dictionary holds, and nothing says otherwise."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )
