"""Copies of a network: whole ones, in a fraction of copy.deepcopy's time, and ones without numbers, for shapes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

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
        raise ValueError(
            f"the network cannot be copied (copy.deepcopy says: {what}), and nothing else is touched"
        ) from error
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
    return copy.deepcopy(value, memo)


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
