"""What is known of prepared data, and whether its files are still those that were written."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from netslim.base import complaint

SPLITS = ("train", "test")
Triple = tuple[float, float, float]
LoaderName = Literal["ffcv", "torch", "device"]


@dataclass(frozen=True)
class DataInfo:
    """Prepared data: where it lies, how to read it, and what training needs to know of it."""

    directory: Path | None  # of train.beton and test.beton; None: read from the source
    loader: LoaderName
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    mean: Triple  # of the training images per channel, in [0, 1]
    std: Triple
    size: int  # pixels
    notes: tuple[str, ...] = ()  # what was left out, turned or cut of the images, or cannot be had here; a line each


@validated(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class FileInfo:
    """What was written of one .beton."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


_Mean = Annotated[float, Field(ge=0, le=1)]
_Std = Annotated[float, Field(gt=0, le=1)]
_Count = Annotated[int, Field(ge=1)]


@validated(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class _Content:
    """The content of `info.json`."""

    loader: LoaderName
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    num_train: _Count
    num_test: _Count
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Std, _Std, _Std]
    size: _Count
    files: dict[str, FileInfo]
    reading: int | None = None
    """By which rules image files were read; None: by the first, or none were."""
    notes: tuple[str, ...] = ()


_LARGEST = 1 << 24  # bytes of `info.json`; ours have some hundred, and a name per class


def damaged(directory: Path, what: str) -> ValueError:
    """The error for files that are not those that were written."""
    return ValueError(f"{what}; delete {directory} and run again")


def read_info(directory: Path) -> tuple[DataInfo, dict[str, FileInfo]]:
    """The content of `info.json`: what to hand on, and bytes and sha256 of each file."""
    content = _read(directory)
    info = DataInfo(
        directory=directory if content.files else None,
        loader=content.loader,
        classes=content.classes,
        num_train=content.num_train,
        num_test=content.num_test,
        mean=content.mean,
        std=content.std,
        size=content.size,
        notes=content.notes,
    )
    return info, content.files


def read_rules(directory: Path) -> int | None:
    """By which rules the images were read, as `info.json` says."""
    return _read(directory).reading


def _read(directory: Path) -> _Content:
    path = directory / "info.json"
    try:
        if path.stat().st_size > _LARGEST or not path.is_file():  # a pipe or a device might never end
            raise ValueError("it is too large, or no file")
        content = TypeAdapter(_Content).validate_json(path.read_bytes())
        names = [f"{name}.beton" for name in SPLITS] if content.loader == "ffcv" else []
        if sorted(content.files) != sorted(names):  # other names could lead anywhere
            raise ValueError(f"the files are {', '.join(names) or 'none'}")
    except ValidationError as error:
        raise damaged(directory, f"{path} is not what was written ({complaint(error)})") from None
    except ValueError as error:
        raise damaged(directory, f"{path} is not what was written ({error})") from None
    return content


def check_sizes(directory: Path) -> None:
    """Raises ValueError when a .beton is missing or cut short: FFCV would crash on it, or hang."""
    for name, expected in read_info(directory)[1].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise damaged(directory, f"{path} is missing")
        if size != expected.bytes:
            raise damaged(directory, f"{path} has {size} bytes, {expected.bytes} were written")


def verify(directory: Path) -> DataInfo:
    """Reads every file once and compares it with what was written; raises ValueError when it differs."""
    info, files = read_info(directory)
    check_sizes(directory)
    for name, expected in files.items():
        if sha256(directory / name) != expected.sha256:
            raise damaged(directory, f"{directory / name} has changed since it was written (sha256 differs)")
    return info


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
