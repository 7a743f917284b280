"""Weights of a file as a network's start: read without running anything, and compared whole before one is taken."""

import hashlib
import io
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from netslim.base import Shapes, misfits, said

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_NESTED = ("state_dict", "model", "model_state_dict", "model_ema")
"""Where training scripts keep the weights in a checkpoint; the first that is there is taken."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""


def digest_of(path: Path) -> str:
    """The SHA-256 of a file of weights, in hexadecimal; raises FileNotFoundError that names the field."""
    _check_there(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_from(model: nn.Module, path: Path, num_classes: int, *, new_head: bool, sha256: str | None) -> str:
    """Load the weights of a file into a network, in place; returns in one line what was taken and what was not.

    With ``new_head`` a classifier that the file has for another number of classes, or not at all, stays as it is.
    Counts of batches, which files of old versions of torch lack, may be missing.

    Raises: FileNotFoundError without a file; ValueError for one that is damaged, changed, or of another network, before
    anything is loaded.
    """
    tensors, key = _read(path, sha256)
    want = _shapes(model)
    tensors = _unwrapped(tensors, want)
    have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in _batch_counts(model):
        if name not in have:
            del want[name]
    heads = {
        layer: names
        for layer, names in _classifiers(model, num_classes)
        if any(have.get(name) != want[name] for name in names)
    }
    fresh = {name for names in heads.values() for name in names}
    _check_shapes(path, want, have, fresh, new_head=new_head)
    taken = {name: tensor for name, tensor in tensors.items() if name not in fresh}
    model.load_state_dict(taken, strict=False)  # what is left out is known
    place = f" under {key!r}" if key else ""
    anew = f"; {', '.join(heads)} stays newly initialised, for {num_classes} classes" if heads else ""
    return f"weights of {path}: {len(taken)} tensors{place}{anew}"


def _check_shapes(path: Path, want: Shapes, have: Shapes, fresh: Collection[str], *, new_head: bool) -> None:
    """Raise ValueError unless all fits but what may be ``fresh``, and that too where no new head is wanted."""
    others = misfits(*({name: shape for name, shape in shapes.items() if name not in fresh} for shapes in (want, have)))
    if others or (fresh and not new_head):
        remedy = "" if others else "; for another number of classes give --model.weights-head new"
        raise ValueError(f"{path} is of another network: {misfits(want, have)}{remedy}")


def _check_there(path: Path) -> None:
    if not path.is_file():  # a pipe or a device might never end
        raise FileNotFoundError(f"model.weights {path}: there is no such file")


def _read(path: Path, sha256: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file by name, and under which key of a checkpoint they were."""
    _check_there(path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"{path} has the sha256 {found:.12}..., model.weights_sha256 is {sha256:.12}...; "
            "bring that file back, or leave model.weights_sha256 None in a new run"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content), None
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # on what is damaged or forged the readers raise whatever comes
        raise ValueError(f"{path} cannot be read as tensors alone: {_reason(error)}; save its state_dict") from None
    return _state_of(path, loaded)


def _reason(error: Exception) -> str:
    """What is wrong, without the advice that torch gives: to run the file all the same."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"it holds {named.group(1)}, which reading would run"
    return "UnpicklingError" if isinstance(error, UnpicklingError) else f"{said(error):.120}"


def _state_of(path: Path, loaded: object) -> tuple[dict[str, Tensor], str | None]:
    for key in (None, *_NESTED):
        state = loaded if key is None else loaded.get(key) if isinstance(loaded, Mapping) else None
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return {str(name): value for name, value in state.items()}, key
    raise ValueError(f"{path} holds no tensors by name, neither itself nor under {', '.join(_NESTED)}")


def _unwrapped(tensors: Mapping[str, Tensor], want: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors without the wrappers' prefixes, which all names have, except those that the network's own have."""
    for prefix in _WRAPPERS * 2:  # in any order
        if all(name.startswith(prefix) for name in tensors) and not all(name.startswith(prefix) for name in want):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict()
    lazy = next((name for name, value in state.items() if is_lazy(value)), None)
    if lazy is not None:
        raise ValueError(f"model.weights needs a network whose shapes are known, and {lazy!r} is lazy; give it a size")
    return {name: tuple(value.shape) for name, value in state.items()}


def _classifiers(model: nn.Module, num_classes: int) -> Iterator[tuple[str, list[str]]]:
    """The layers that may be classifiers, with the names of their parameters: those that have an output per class."""
    for layer, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1})
        parameters = dict(module.named_parameters(layer, recurse=False))
        if is_linear and all(parameter.shape[0] == num_classes for parameter in parameters.values()):
            yield layer, list(parameters)


def _batch_counts(model: nn.Module) -> Iterator[str]:
    for layer, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield f"{layer}.num_batches_tracked".removeprefix(".")
