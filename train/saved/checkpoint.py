"""Checkpoints on disk: each is complete or absent, verified by hashes before it is used, and read without pickle."""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from netslim.base import flush, write_flushed

FORMAT = 1
"""Of the files; a checkpoint of a newer one is refused, not guessed at."""

_TENSORS, _VALUES, _MANIFEST = "tensors.safetensors", "values.json", "manifest.json"
_LARGEST_MANIFEST = 1 << 20  # bytes; ours have some hundred
_LARGEST_VALUES = 1 << 26  # bytes; ours have some hundred an epoch
_NAME = re.compile(r"step-(\d{8,})")
_LEFT = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}")


@dataclass(frozen=True)
class Snapshot:
    """The state of a training run between two optimizer steps."""

    step: int
    """Optimizer steps that were done."""
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    """JSON: position in the data, metrics so far, and what the tensors do not hold."""


class Store:
    """The checkpoints of one stage, in a directory of its own; only rank 0 writes.

    A checkpoint is a directory `step-N` with tensors, values and, written last, a manifest of sizes and sha256. It is
    made under another name, flushed to the disk, and renamed, so that a crash at any moment leaves it whole or absent.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep

    def save(self, snapshot: Snapshot, best_step: int | None = None) -> Path:
        """Write a checkpoint, then delete all but the newest `keep` and the best; the best stays until it is replaced
        by one that verifies.

        Raises: OSError if the disk is full or may not be written; older checkpoints are then as they were.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        target = self._path(snapshot.step)
        contents = {
            _TENSORS: safetensors.torch.save(dict(snapshot.tensors)),
            _VALUES: json.dumps({"step": snapshot.step, **snapshot.values}).encode(),
        }
        files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
        contents[_MANIFEST] = json.dumps({"format": FORMAT, "files": files}).encode()
        draft = self.directory / f".{target.name}.{secrets.token_hex(4)}"
        try:
            draft.mkdir()
            for name, content in contents.items():  # the manifest comes last
                write_flushed(draft / name, content)
            flush(draft)
            if target.exists():  # of an attempt that was resumed from before this step
                _discard(target)
            draft.rename(target)
            flush(self.directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._delete_others(target, best_step)
        return target

    def check_room(self, need: int) -> None:
        """Raise OSError, which says both, where ``need`` bytes are neither free nor those of earlier checkpoints."""
        place = next(path for path in (self.directory, *self.directory.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(place).free
        own = sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())
        if free + own < need:
            raise OSError(
                ENOSPC,
                f"{os.strerror(ENOSPC)}: about {need / 2**20:,.1f} MiB are needed for checkpoints and weights, "
                f"{(free + own) / 2**20:,.1f} MiB are free",
                str(place),
            )

    def newest(self, say: Callable[[str], None]) -> Snapshot | None:
        """Read the newest checkpoint that verifies; `say` is told of each newer one that does not, and why.

        Raises: ValueError, with the reason of each, where there are checkpoints and none of them can be used.
        """
        reasons = []
        for path in reversed(self._all()):
            try:
                found = read(path)
            except ValueError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                say(f"{reason}; the checkpoint before it is used")
            return found
        if reasons:
            raise ValueError(
                f"{'; '.join(reasons)}; none of the {len(reasons)} checkpoints in {self.directory} can be used; "
                "delete the directory to start anew"
            )
        return None

    def read(self, step: int) -> Snapshot:
        """Read the checkpoint after this step; ValueError where it does not verify."""
        return read(self._path(step))

    def sweep(self) -> None:
        """Delete what interrupted writes left behind, and nothing else: the directory may be a link to anywhere."""
        for path in self.directory.glob(".step-*"):
            if _LEFT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        named = (path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))
        return sorted((path for path in named if path == self._path(_step_of(path))), key=_step_of)

    def _delete_others(self, newest: Path, best_step: int | None) -> None:
        found = self._all()
        kept = {newest, *found[-self.keep :]}
        best = [path for path in found if _step_of(path) == best_step]
        if best == [newest]:
            read(newest)  # before the best one so far is given up
        for path in found:
            if path not in kept and path not in best:
                _discard(path)


def read(path: Path) -> Snapshot:
    """Read and verify one checkpoint; ValueError, in one line, if it is damaged, of a newer format, or none at all."""
    manifest = _manifest(path)
    contents = {}
    for name in (_TENSORS, _VALUES):  # no names out of the manifest: they could lead anywhere
        try:
            expected = manifest["files"][name]
            size, sha256 = expected["bytes"], expected["sha256"]
            found = _size(path / name)
            if found != size:
                raise ValueError(f"{name} has {found} bytes, {size} were written")
            if name == _VALUES and found > _LARGEST_VALUES:
                raise ValueError(f"{name} has {found} bytes")
            contents[name] = (path / name).read_bytes()
            if hashlib.sha256(contents[name]).hexdigest() != sha256:
                raise ValueError(f"{name} has changed since it was written (sha256 differs)")
        except (KeyError, TypeError, ValueError, OSError, MemoryError) as error:
            raise ValueError(f"checkpoint {path} is damaged: {_first_line(error)}") from None
    try:
        values = json.loads(contents[_VALUES])
        step = values.pop("step")
        if type(step) is not int or (_NAME.fullmatch(path.name) and step != _step_of(path)):
            raise ValueError(f"{_VALUES} is of step {step!r:.40}")
        return Snapshot(step, safetensors.torch.load(contents[_TENSORS]), values)
    # of torch: TypeError and RuntimeError, for shapes that no tensor can have
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {_first_line(error)}") from None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        size = _size(path / _MANIFEST)
        if size > _LARGEST_MANIFEST:
            raise ValueError(f"{_MANIFEST} has {size} bytes")
        manifest = json.loads((path / _MANIFEST).read_bytes())
        version = manifest["format"]
    except (KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {_first_line(error)}") from None
    if version != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {version!r:.40}, this netslim reads {FORMAT}; use the one it is of"
        )
    return cast(dict[str, Any], manifest)


def _size(file: Path) -> int:
    """The bytes of a file; ValueError for what only looks like one: reading a pipe or a device might never end."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is no regular file")
    return status.st_size


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return str(error).partition("\n")[0] or type(error).__name__


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match, "listed by this name"
    return int(match.group(1))


def _discard(path: Path) -> None:
    """Delete a directory so that none with a part of its files can be met under its name."""
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
