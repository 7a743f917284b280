"""The recorder: sees every torch function that a run of a network calls."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from netslim.prune.record.calls import Call, Passage, Record, has_others, mapped, results_of, tensors_of
from netslim.prune.record.functions import METADATA, is_inplace, name_of
from netslim.prune.record.lines import line_of_traceback
from netslim.prune.record.shapes import shaped


class Observer(Protocol):
    """What follows the values of a run while it goes on."""

    def enters(self, number: int, value: Tensor, kind: str, name: str) -> None:
        """Meet a value that no call made: an "input", a "parameter", a "buffer", or a "constant"."""

    def sizes(self, number: int) -> tuple[int, ...] | None:
        """Give the sizes that the network shall read off a value; None = its own."""

    def follows(
        self, call: Call, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, recorder: Recorder
    ) -> None:
        """See a call, with the values that went in and came out, after it."""

    def leaves(self, record: Record) -> None:
        """Learn that the run is over."""


class Failed(Exception):  # noqa: N818  # the network's own error, with the place where it happened
    """A network that does not run on its example: which call failed."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(where)
        self.where, self.error = where, error


class Recorder(TorchFunctionMode):
    """Records one run of a network that is the recorder's to spoil: hooks are put on it, its state may change."""

    def __init__(self, model: nn.Module, observer: Observer | None = None, *, watch: bool = False) -> None:
        super().__init__()
        self.model, self.observer = model, observer
        self.record = Record()
        self.has_strangers = False
        """Whether there were values that no call, parameter or input accounts for: constants, or what ran unseen."""
        self._watch = _Unseen(self) if watch else None
        self._names = {id(buffer): (name, "buffer") for name, buffer in model.named_buffers()}
        self._names |= {id(parameter): (name, "parameter") for name, parameter in model.named_parameters()}
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no other tensor gets the identity of one of them
        self._storages: dict[int, list[int]] = defaultdict(list)
        self._homes = [""]
        self._has_sizes = False
        self.is_inside = False
        """Whether a function that was seen is being executed."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_training: bool = False) -> Record:
        """Run the network on an example, in either mode; raises `Failed` where it does not."""
        hooks = [hook for name, module in self.model.named_modules() for hook in self._follow_module(name, module)]
        for value in tensors_of((args, kwargs)):
            self._enter(value, "input", "")
        try:
            self.model.train(is_training)  # which the network may refuse, too
            with self._watch or nullcontext(), self:
                results = results_of(self.model(*args, **kwargs))
        except Exception as error:
            raise Failed(self._where(error), error) from error
        finally:
            for hook in hooks:
                hook.remove()
        self.record.results = tuple(self.number_of(value) for value in results)
        if self.observer is not None:
            self.observer.leaves(self.record)
        self._alive.clear()
        return self.record

    def number_of(self, value: Tensor) -> int:
        """Give the number of a value; one that was never seen is a parameter, a buffer or a constant."""
        number = self._numbers.get(id(value))
        if number is None:
            name, kind = self._names.get(id(value), ("", "constant"))
            self.has_strangers |= not name
            number = self._enter(value, kind, name)
        return number

    def shares_memory(self, value: Tensor, number: int) -> list[int]:
        """Name the other values that lie in the memory of this one, which `number` is the newest state of."""
        storage = _storage_of(value)
        own = id(value)
        return [n for n in self._storages.get(storage, ()) if n != number and id(self._alive[n]) != own]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        self.is_inside = True
        try:
            if name in METADATA:
                return func(*args, **kwargs)
            if name in ("size", "get_shape", "numel", "nelement"):
                return self._size(name, func, args, kwargs)
            if self._counts(func, args):
                return func(*args, **kwargs)
            inputs = tuple(map(self.number_of, tensors_of((args, kwargs))))
            # an observer's sizes are for the network's own code, not for torch's
            some, others = (mapped(args, _plain), mapped(kwargs, _plain)) if self._has_sizes else (args, kwargs)
            known = shaped(name, some, others, inplace=is_inplace(func) or kwargs.get("inplace", False))
            result = func(*some, **others) if known is None else known
            self._note(name, func, args, kwargs, inputs, result)
            return result
        finally:
            self.is_inside = False

    def _counts(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Tell whether a buffer only counts, as a BatchNorm its batches in training: that tells nothing."""
        return (
            is_inplace(func)
            and bool(args)
            and isinstance(args[0], Tensor)
            and not args[0].dim()
            and id(args[0]) in self._names
        )

    def unseen(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an operation that no torch function called by Python accounts for."""
        if tensors_of((args, kwargs)):
            name = f"{name_of(func)} (in compiled code)"
            self._note(name, func, args, kwargs, tuple(map(self.number_of, tensors_of((args, kwargs)))), result)

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, inputs: tuple[int, ...], result: Any) -> None:
        made = tensors_of(result)
        if is_inplace(func) and args and isinstance(args[0], Tensor) and not any(v is args[0] for v in made):
            made.insert(0, args[0])  # __setitem__ returns nothing
        outputs = tuple(self._number(value) for value in made)
        call = Call(name, inputs, outputs, self._homes[-1])
        self.record.calls.append(call)
        if self.observer is not None:
            self.observer.follows(call, func, args, kwargs, made, self)

    def _number(self, value: Tensor) -> int:
        """Give a value that a call made, or wrote into, a new number."""
        number = len(self._alive)
        self._alive.append(value)
        self._numbers[id(value)] = number
        self._storages[_storage_of(value)].append(number)
        return number

    def _enter(self, value: Tensor, kind: str, name: str) -> int:
        if not self.is_inside:
            with self._aside():
                return self._enter(value, kind, name)
        number = self._number(value)
        if name:
            self.record.parameters[number] = name
        if self.observer is not None:
            self.observer.enters(number, value, kind, name)
        return number

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Compute something that is no part of the network's run."""
        before, self.is_inside = self.is_inside, True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self.is_inside = before

    def _size(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        sizes = self.observer.sizes(self.number_of(args[0])) if self.observer is not None else None
        if sizes is None:
            return result
        self._has_sizes = True
        if name in ("numel", "nelement"):
            return reduce(operator.mul, sizes)
        if isinstance(result, int):
            return sizes[args[1] if len(args) > 1 else kwargs["dim"]]
        return torch.Size(sizes)

    def _follow_module(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Know when a module runs, and what goes in and out of it."""
        if not name or isinstance(module, torch.jit.ScriptModule):  # that takes no such hooks
            return
        came: list[tuple[int, ...]] = []

        def enter(_: nn.Module, args: Any) -> None:
            self._homes.append(name)

        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            came.append(tuple(map(self.number_of, tensors_of((args, kwargs)))))

        def leave(_: nn.Module, args: Any, result: Any) -> None:
            while self._homes.pop() != name:  # what lies above ended in an error that the network caught
                pass
            made = tuple(map(self.number_of, tensors_of(result)))
            self.record.passages[name].append(Passage(came.pop(), made, self._homes[-1], has_others(result)))

        # before and after the network's own hooks, which may change what goes in
        yield module.register_forward_pre_hook(enter, prepend=True)
        yield module.register_forward_pre_hook(take, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def _where(self, error: Exception) -> str:
        line = line_of_traceback(error)
        home = f"'{self._homes[-1]}'" if self._homes[-1] else "its forward"
        return f"{home} ({line})" if line else home


def _plain(value: Any) -> Any:
    """Put a plain number in place of an observer's."""
    return int.__int__(value) if isinstance(value, int) and type(value) not in (int, bool) else value


class _Unseen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations of scripted and other compiled code, which call no torch function by Python."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.is_inside:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
            self.recorder.unseen(func, args, kwargs or {}, result)
        return result


def _storage_of(value: Tensor) -> int:
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors
        return id(value)
