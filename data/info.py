"""What is known of prepared data, and whether its files are still those that were written."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

SPLITS = ("train", "test")
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class DataInfo:
    """Prepared data: where it lies, how to read it, and what training needs to know of it."""

    directory: Path | None  # of train.beton and test.beton; None: read from the source
    loader: Literal["ffcv", "torch"]
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    mean: Triple  # of the training images per channel, in [0, 1]
    std: Triple
    size: int  # pixels


def damaged(directory: Path, what: str) -> ValueError:
    """The error for files that are not those that were written."""
    return ValueError(f"{what}; delete {directory} and run again")


def read_info(directory: Path) -> tuple[DataInfo, dict[str, Any]]:
    """The content of `info.json`: what to hand on, and bytes and sha256 of each file."""
    path = directory / "info.json"
    try:
        raw = json.loads(path.read_bytes())
        files = cast(dict[str, Any], raw["files"])
        info = DataInfo(
            directory=directory if files else None,
            loader=raw["loader"],
            classes=tuple(raw["classes"]),
            num_train=raw["num_train"],
            num_test=raw["num_test"],
            mean=cast(Triple, tuple(raw["mean"])),
            std=cast(Triple, tuple(raw["std"])),
            size=raw["size"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(directory, f"{path} is not what was written ({error!r})") from None
    return info, files


def check_sizes(directory: Path) -> None:
    """Raises ValueError when a .beton is missing or cut short: FFCV would crash on it, or hang."""
    for name, expected in read_info(directory)[1].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise damaged(directory, f"{path} is missing")
        if size != expected["bytes"]:
            raise damaged(directory, f"{path} has {size} bytes, {expected['bytes']} were written")


def verify(directory: Path) -> DataInfo:
    """Reads every file once and compares it with what was written; raises ValueError when it differs."""
    info, files = read_info(directory)
    check_sizes(directory)
    for name, expected in files.items():
        if sha256(directory / name) != expected["sha256"]:
            raise damaged(directory, f"{directory / name} has changed since it was written (sha256 differs)")
    return info


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
