"""A network run on an example: on a copy without numbers where that suffices, in both modes, and nothing is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netslim.prune.record.calls import Record, mapped, tensors_of
from netslim.prune.record.copies import replica, weightless
from netslim.prune.record.kept import untouched
from netslim.prune.record.recorder import Failed, Recorder

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What a network is called with: images (n, 3, height, width), a tuple or list of positional arguments, or a dictionary
of arguments by name; tensors may lie deeper in lists and dictionaries."""
Result = TypeVar("Result")

_WRAPPERS = {
    "DistributedDataParallel": "model.module",
    "DataParallel": "model.module",
    "FullyShardedDataParallel": "the module that it wraps",
    "DeepSpeedEngine": "engine.module",
    "OptimizedModule": "the module before torch.compile: model._orig_mod",
}


def arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read an example as the arguments of a call: positional ones, and those by name."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def call(model: nn.Module, example: Example) -> Any:
    """Call a network with an example."""
    args, kwargs = arguments(example)
    return model(*args, **kwargs)


def moved(example: Example, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Example:
    """Copy an example to a device, its floating-point tensors to a type; what is no tensor stays."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None)

    made: Example = mapped(example, one)
    return made


def check(model: nn.Module, example: Example) -> None:
    """Refuse, before any work, what cannot be mapped: wrappers, and an example that is none or lies elsewhere.

    Raises: ValueError that says what to pass instead.
    """
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise ValueError(f"{kind} only wraps the network; pass {_WRAPPERS[kind]}")
    scripted = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted == "":
        raise ValueError("a scripted module shows no forward to follow; pass the module before torch.jit.script")
    tensors = tensors_of(example)
    if not tensors or any(not value.numel() for value in tensors):
        shapes = ", ".join(str(tuple(value.shape)) for value in tensors) or "no tensors"
        raise ValueError(f"an example of shape {shapes} is no batch of images (n, 3, height, width)")
    weights = [p for p in model.parameters() if p.is_floating_point()]
    homes = {p.device for p in weights} - {torch.device("meta")}  # a network without numbers is mapped all the same
    for value in tensors:
        if len(homes) == 1 and value.device not in homes:
            raise ValueError(f"the example is on {value.device}, the network on {next(iter(homes))}; move one of them")
        kinds = {p.dtype for p in weights}
        if value.is_floating_point() and len(kinds) == 1 and value.dtype not in kinds:
            raise ValueError(f"the example is {value.dtype}, the network {next(iter(kinds))}; convert one of them")


def on_a_copy(model: nn.Module, example: Example, ask: Callable[[nn.Module, Example], Result]) -> Result:
    """Ask a copy of the network in eval mode, one without numbers if that suffices.

    Networks that read values while they run (`.item()`, tensors made on a fixed device) need a copy with their numbers.
    Whatever happens, the network, what its hooks keep, and the states of random numbers are as they were.
    """
    with untouched(model), torch.no_grad():
        try:
            return ask(_alone(weightless(model)), moved(example, "meta"))
        except Exception:  # whatever it was: the copy with numbers decides, and its error is the user's
            return ask(_alone(replica(model, {})), moved(example))


class _Alone(nn.SyncBatchNorm):
    """A BatchNorm that asks no other process: where others run too, they need not do the same at this moment."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)  # one forward for all kinds


_Alone.__name__ = nn.SyncBatchNorm.__name__


def _alone(model: nn.Module) -> nn.Module:
    """Put a copy into eval mode, where it needs no other process in either mode."""
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = _Alone
    return model.eval()


def recorded(model: nn.Module, example: Example) -> Record:
    """Record what a network calls in eval mode; it is not changed.

    Raises: ValueError if it does not run on the example.
    """

    def record(twin: nn.Module, some: Example) -> Record:
        recorder = Recorder(twin)
        found = recorder.run(*arguments(some))
        return Recorder(twin, watch=True).run(*arguments(some)) if recorder.has_strangers else found

    try:
        return on_a_copy(model, example, record)
    except Failed as failed:
        raise ValueError(said(failed, example)) from failed.error


def trains_alike(model: nn.Module, example: Example) -> bool:
    """Tell whether a network calls the same functions in training mode as in eval mode, or does not run in training."""

    def compared(twin: nn.Module, some: Example) -> bool:
        seen = Recorder(twin).run(*arguments(some)).course
        return Recorder(twin).run(*arguments(doubled(some)), is_training=True).course == seen

    try:
        return on_a_copy(model, example, compared)
    except Failed:
        return True


def doubled(example: Example) -> Example:
    """Give a single image twice: in training some BatchNorms refuse a batch of one."""
    if isinstance(example, Tensor) and example.dim() and len(example) == 1:
        return example.expand(2, *example.shape[1:])
    return example


def said(failed: Failed, example: Example) -> str:
    """Say in one line that a network does not run on its example, and where."""
    shapes = ", ".join(str(tuple(value.shape)) for value in tensors_of(example))
    what = str(failed.error).strip().partition("\n")[0] or type(failed.error).__name__
    return (
        f"the network does not run on an example of shape {shapes}: {failed.where} says: {what}; "
        "give an example that it accepts"
    )
