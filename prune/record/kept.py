"""What running a copy of a network may change of the network itself, put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEEPEST = 6
"""Objects that lie in one another, from a module on, up to which what they hold is put back."""
_MOST = 1 << 12
"""Parts of a container, elements of a tensor, up to which they are looked at one by one."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, in any case, what running a copy of a network may change, and the states of random numbers.

    A hook belongs to the network and to its copy, a cache to the class of both: what is kept in closures, containers,
    global variables or on objects would be the copy's values.
    """
    kept = _Kept(model)
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(_devices(model)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        kept.put_back()


class _Kept:
    """What modules, and the functions and objects around them, hold."""

    def __init__(self, model: nn.Module) -> None:
        self._boxes: dict[int, tuple[Any, Any]] = {}
        self._cells: list[tuple[CellType, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._caches: list[tuple[Any, int]] = []
        self._seen: set[int] = set()
        self._kinds: set[type] = set()
        with torch.no_grad():
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    self._visit_module(module)
            for buffer in model.buffers():
                self._tensors.append((buffer, buffer._version, buffer.clone()))

    def put_back(self) -> None:
        """Make everything what it was."""
        for box, content in self._boxes.values():
            if not _is_same(box, content):
                _refill(box, content)
        for cell, content in self._cells:
            cell.cell_contents = content
        with torch.no_grad():
            for tensor, version, content in self._tensors:
                if tensor._version != version:
                    tensor.copy_(content)
        for function, size in self._caches:
            if function.cache_info().currsize != size:
                function.cache_clear()

    def _visit_module(self, module: nn.Module) -> None:
        """Look at what a module holds: of what torch itself keeps on every module, the hooks alone."""
        self._seen.add(id(module))
        state = vars(module)
        self._boxes[id(state)] = state, state.copy()
        for name, value in state.items():
            if name in _PARTS:
                self._boxes[id(value)] = value, value.copy()
            elif (name not in _TORCHS or value) and not isinstance(value, _ATOMS):
                self._visit(value, 1)
        self._visit_class(type(module), 0)

    def _visit(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEEPEST or isinstance(value, _ATOMS):
            return
        self._seen.add(id(value))
        if isinstance(value, (dict, list, set, deque)):
            self._boxes[id(value)] = value, value.copy()
            parts = value.values() if isinstance(value, dict) else value
            for part in parts if len(value) <= _MOST else ():
                self._visit(part, depth + 1)
        elif isinstance(value, tuple):
            for part in value:
                self._visit(part, depth + 1)
        elif isinstance(value, FunctionType):
            self._visit_function(value, depth)
        elif isinstance(value, MethodType):
            self._visit(value.__func__, depth)
            self._visit(value.__self__, depth + 1)
        elif isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self._visit(part, depth)
        elif isinstance(value, Tensor):
            if depth and value.numel() <= _MOST and not isinstance(value, nn.Parameter) and not value.is_meta:
                self._tensors.append((value, value._version, value.detach().clone()))
        elif callable(getattr(value, "cache_clear", None)):
            self._caches.append((value, value.cache_info().currsize))
        elif hasattr(value, "__dict__"):
            self._visit(vars(value), depth)
            self._visit_class(type(value), depth)

    def _visit_function(self, function: FunctionType, depth: int) -> None:
        """Look at what a function of the user's holds in its closure, defaults, and the globals that it names."""
        if _is_torchs(function.__module__):
            return
        for cell in function.__closure__ or ():
            if cell != CellType():
                self._cells.append((cell, cell.cell_contents))
                self._visit(cell.cell_contents, depth + 1)
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            self._visit(part, depth)
        for name in _names(function.__code__):
            if name in function.__globals__:
                self._visit(function.__globals__[name], depth + 1)

    def _visit_class(self, kind: type, depth: int) -> None:
        """Look at what classes of the user's hold, and at their functions."""
        for base in kind.__mro__:
            if base not in self._kinds and not _is_torchs(base.__module__):
                self._kinds.add(base)
                for value in vars(base).values():
                    self._visit(value, depth + 1)


_PARTS = frozenset(("_parameters", "_buffers", "_modules"))
_TORCHS = frozenset(vars(nn.Module())) - _PARTS
_ATOMS = (int, float, complex, str, bytes, type(None), type, ModuleType, BuiltinFunctionType, torch.dtype, torch.device)


def _is_torchs(name: str | None) -> bool:
    return (name or "builtins").partition(".")[0] in (
        "torch",
        "torchvision",
        "builtins",
        "numpy",
        "functools",
        "typing",
    )


def _names(code: CodeType) -> set[str]:
    """Name the globals that a function's code mentions, and the functions within it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _is_same(box: Any, content: Any) -> bool:
    if len(box) != len(content):
        return False
    if isinstance(box, dict):
        return all(box.get(key, box) is value for key, value in content.items())
    if isinstance(box, set):
        return bool(box == content)
    return all(old is new for old, new in zip(box, content, strict=True))


def _refill(box: Any, content: Any) -> None:
    box.clear()
    if isinstance(box, (list, deque)):
        box.extend(content)
    else:
        box.update(content)


def _devices(model: nn.Module) -> list[torch.device]:
    return [device for device in {p.device for p in model.parameters()} if device.type not in ("cpu", "meta")]
