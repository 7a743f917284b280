"""Checkpoints on disk: each is complete or absent, verified by hashes before it is used, and read without pickle."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT = 1
"""Of the files; a checkpoint of a newer one is refused, not guessed at."""

_TENSORS, _VALUES, _MANIFEST = "tensors.safetensors", "values.json", "manifest.json"
_LARGEST_MANIFEST = 1 << 20  # bytes; ours have some hundred
_NAME = re.compile(r"step-(\d{8,})")


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
                _write(draft / name, content)
            _flush(draft)
            if target.exists():  # of an attempt that was resumed from before this step
                _discard(target)
            draft.rename(target)
            _flush(self.directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._delete_others(target, best_step)
        return target

    def newest(self, say: Callable[[str], None]) -> Snapshot | None:
        """Read the newest checkpoint that verifies; `say` is told of each newer one that does not, and why.

        Raises: ValueError where there are checkpoints and none of them can be used.
        """
        found = self._all()
        for path in reversed(found):
            try:
                return read(path)
            except ValueError as error:
                say(f"{error}; the checkpoint before it is used")
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoints in {self.directory} can be used; "
                "delete the directory to start anew"
            )
        return None

    def read(self, step: int) -> Snapshot:
        """Read the checkpoint after this step; ValueError where it does not verify."""
        return read(self._path(step))

    def sweep(self) -> None:
        """Delete what interrupted writes left behind."""
        for path in self.directory.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=_step_of)

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
            file = path / name
            if file.stat().st_size != size:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, {size} were written")
            contents[name] = file.read_bytes()
            if hashlib.sha256(contents[name]).hexdigest() != sha256:
                raise ValueError(f"{name} has changed since it was written (sha256 differs)")
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"checkpoint {path} is damaged: {_first_line(error)}") from None
    try:
        values = json.loads(contents[_VALUES])
        return Snapshot(values.pop("step"), safetensors.torch.load(contents[_TENSORS]), values)
    except (KeyError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {_first_line(error)}") from None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        file = path / _MANIFEST
        if file.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"{_MANIFEST} has {file.stat().st_size} bytes")
        manifest = json.loads(file.read_bytes())
        version = manifest["format"]
    except (KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {_first_line(error)}") from None
    if version != FORMAT:
        raise ValueError(f"checkpoint {path} has format {version!r}, this netslim reads {FORMAT}; use the one it is of")
    return cast(dict[str, Any], manifest)


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return str(error).partition("\n")[0]


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match, "listed by this name"
    return int(match.group(1))


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(directory: Path) -> None:
    """Make the names in a directory last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    """Delete a directory so that none with a part of its files can be met under its name."""
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
