"""A slim network on disk: weights.safetensors and plan.json, written atomically and read without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from netslim.base import misfits, replace_all
from netslim.prune.choose import Origin, Plan
from netslim.prune.cut import cut

WEIGHTS, PLAN, ORIGIN = "weights.safetensors", "plan.json", "origin.json"
_LARGEST = 1 << 24  # bytes; the plan of a DenseNet-201 has 0.7 million
T = TypeVar("T")


def save(model: nn.Module, plan: Plan | None, directory: str | os.PathLike[str], origin: Origin | None = None) -> None:
    """Write the network's parameters and buffers, and its plan if it has one, into a directory.

    The files are written beside the old ones first and then put in their place, so a full disk leaves the old ones
    whole. The weights name the plan's digest: `load` refuses files of two different saves. With an origin, which is
    kept in the plan, or in a file of its own for a network that is whole, `load` needs nothing but the directory.

    Raises: OSError if the files cannot be written.
    """
    if plan is not None and origin is not None:
        plan = replace(plan, origin=origin)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # one key: the order of several is random in the file, and equal networks should be equal bytes
    metadata = {"netslim": json.dumps({"version": 1, "plan": None if plan is None else plan.digest})}
    contents = {WEIGHTS: safetensors.torch.save(_tensors(model), metadata)}
    if plan is not None:
        contents[PLAN] = plan.to_json().encode()
    elif origin is not None:
        contents[ORIGIN] = origin.to_json().encode()
    replace_all(directory, contents)
    for name in {PLAN, ORIGIN} - contents.keys():
        (directory / name).unlink(missing_ok=True)


def load(directory: str | os.PathLike[str], build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Build the original network, cut it by the plan beside the weights, if there is one, and load the weights.

    Without `build` the network is built as the origin beside the weights says; see `Origin` for what that may call.
    Device, dtype and memory format are those of the built network. Nothing is ever unpickled.

    Raises: FileNotFoundError without weights; ValueError if a file is damaged, or is not of the network that was built,
    or if neither `build` nor an origin says how to build one.
    """
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    plan = load_plan(directory)
    tensors, about = _read(path)
    if about and about.get("plan") != (None if plan is None else plan.digest):
        raise ValueError(f"{path} and its {PLAN} are not of one save; save again")
    if build is None:
        origin = load_origin(directory)
        if origin is None:
            raise ValueError(f"nothing in {directory} says how its network is built; load it with build=...")
        build = origin.build
    model = build()
    if plan is not None:
        model = cut(model, plan)
    _check_keys(path, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model


def load_plan(directory: str | os.PathLike[str]) -> Plan | None:
    """Read the plan in a directory; None if there is none, ValueError naming the file if it is damaged."""
    return _parsed(Path(directory) / PLAN, Plan.from_json)


def load_origin(directory: str | os.PathLike[str]) -> Origin | None:
    """Read how the network in a directory is built; None if nothing says so, ValueError naming the file at fault."""
    plan = load_plan(directory)
    return plan.origin if plan is not None else _parsed(Path(directory) / ORIGIN, Origin.from_json)


def _parsed(path: Path, parse: Callable[[str], T]) -> T | None:
    try:
        if path.stat().st_size > _LARGEST or not path.is_file():  # a pipe or a device might never end
            raise ValueError("it is too large, or no file")
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"'{key}' of the network is no tensor and cannot be saved without pickle")
        # clone: safetensors refuses tensors that share memory
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what `save` said about them; nothing for another program's file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata.get("netslim", "{}"))
            if not isinstance(about, dict):
                raise ValueError("its metadata are not what was written")
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118
    # of torch: TypeError and RuntimeError, for shapes that no tensor can have
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        what = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {what}") from None


def _check_keys(path: Path, want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> None:
    shapes = [{key: tuple(value.shape) for key, value in tensors.items()} for tensors in (want, have)]
    if found := misfits(*shapes):
        raise ValueError(f"{path} is of another network: {found}")
