"""Any folder of images, one sub-folder per class: which files are images, and what is left out."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from netslim.data.pixels import Reading, Seen, read, suffixes
from netslim.data.splits import Source

TESTS = ("test", "val", "valid", "validation")
"""Folders of the images to test with; the first that is there."""
_MOST_KINDS = 6  # of files left out that are named
_MOST_CLASSES = 5


@dataclass(frozen=True)
class FolderSplit:
    """Image files, decoded when asked for. Raises UnreadableError, naming the file, for one that cannot be read."""

    root: str
    names: list[str]  # relative to root
    labels: list[int]
    reading: Reading

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        pixels, label, _ = self.read(index)
        return pixels, label

    def read(self, index: int) -> tuple[NDArray[np.uint8], int, Seen]:
        """Pixels, label, and what the image was like."""
        pixels, seen = read(self.path(index), self.reading)
        return pixels, self.labels[index], seen

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])


def looks_like_images(root: Path) -> bool:
    """Whether `root` has the layout that the source "folder" reads."""
    return (root / "train").is_dir() and any((root / name).is_dir() for name in TESTS)


def scan(root: Path, reading: Reading) -> Source:
    """Find the images of `root`, in sub-folders of the classes too; the fingerprint is of their names, sizes and times.

    Raises FileNotFoundError when a folder is missing, ValueError when classes are empty or differ, or there is one.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; name the folder that holds train/ with --data.root")
    if not (root / "train").is_dir():
        raise FileNotFoundError(f"no folder {root / 'train'}; images belong in train/<class>/ below --data.root")
    tests = [root / name for name in TESTS if (root / name).is_dir()]
    if not tests:
        raise FileNotFoundError(
            f"neither test/ nor val/ in {root}, nor valid/ or validation/; put images to test with in test/<class>/"
        )
    folders = (root / "train", tests[0])
    left = Counter[str]()
    train, test = (_classes(folder, left) for folder in folders)
    if train != test:
        raise ValueError(
            f"train/ and {tests[0].name}/ of {root} must hold the same classes; {_odd(folders, train, test)}"
        )
    if len(train) == 1:
        raise ValueError(_one_class(folders[0] / train[0]))
    digest = hashlib.sha256()
    splits = [_split(folder, train, reading, digest, left) for folder in folders]
    notes = [f"{root} also holds {other.name}/, which is not read: {tests[0].name}/ is" for other in tests[1:]]
    if left:
        notes.append(f"left out of {root}: {_kinds(left)}")
    return Source(splits[0], splits[1], train, digest.hexdigest(), tuple(notes))


def _classes(folder: Path, left: Counter[str]) -> tuple[str, ...]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                found.append(entry.name)
            else:
                left["hidden" if entry.name.startswith(".") else "outside of all classes"] += 1
    if not found:
        raise ValueError(f"no class folders in {folder}; images belong in {folder}/<class>/")
    return tuple(sorted(found))


def _odd(folders: Sequence[Path], *classes: Sequence[str]) -> str:
    """Which classes each of two folders has alone."""
    parts = []
    for folder, own, other in zip(folders, classes, reversed(classes), strict=True):
        alone = sorted({*own} - {*other})
        more = f" and {len(alone) - _MOST_CLASSES} more" * (len(alone) > _MOST_CLASSES)
        if alone:
            parts.append(f"{folder.name}/ alone has {', '.join(alone[:_MOST_CLASSES])}{more}")
    return "; ".join(parts)


def _one_class(folder: Path) -> str:
    with os.scandir(folder) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    remedy = "add the folders of the others"
    if len(inner) > 1:
        remedy = f"if {', '.join(inner[:_MOST_CLASSES])} in it are the classes, move them up"
    return f"{folder.parent} holds one class alone, {folder.name}, which leaves nothing to tell apart; {remedy}"


def _split(
    folder: Path, classes: Sequence[str], reading: Reading, digest: "hashlib._Hash", left: Counter[str]
) -> FolderSplit:
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        others = Counter[str]()
        files = sorted(_Walk(others).images(folder / name, f"{name}/"), key=_name)
        if not files:
            why = f"it holds {_kinds(others)}" if others else "it is empty"
            raise ValueError(f"no images in {folder / name} ({why}); add some or remove the class everywhere")
        left.update(others)
        for path, status in files:
            digest.update(os.fsencode(f"{folder.name}/{path}\0{status.st_size}\0{status.st_mtime_ns}\n"))
        names += [path for path, _ in files]
        labels += [label] * len(files)
    return FolderSplit(str(folder), names, labels, reading)


@dataclass(frozen=True)
class _Walk:
    """Through a class's folder and those below; what is no image is counted by kind."""

    left: Counter[str]
    above: set[tuple[int, int]] = field(default_factory=set)
    """The folders that it is in: a link back to one of them would be followed for ever."""

    def images(self, folder: Path | str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        """The path of each image, below `prefix`, and its size and time."""
        status = os.stat(folder)
        key = (status.st_dev, status.st_ino)
        if key in self.above:
            self.left["links to a folder above"] += 1
            return
        self.above.add(key)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    self.left["hidden"] += 1
                elif entry.is_dir():
                    yield from self.images(entry.path, f"{prefix}{entry.name}/")
                elif not entry.is_file():
                    self.left["broken links" if entry.is_symlink() else "no regular files"] += 1
                elif _suffix(entry.name) in suffixes():
                    yield f"{prefix}{entry.name}", entry.stat()
                else:
                    self.left[_suffix(entry.name) or "without a suffix"] += 1
        self.above.remove(key)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _kinds(left: Counter[str]) -> str:
    """How many of which kind, the most first."""
    kinds = sorted(left.items(), key=lambda each: (-each[1], each[0]))
    named = [f"{count:,} {kind}" for kind, count in kinds[:_MOST_KINDS]]
    rest = sum(count for _, count in kinds[_MOST_KINDS:])
    return ", ".join([*named, *([f"{rest:,} of other kinds"] if rest else [])])


def _name(file: tuple[str, os.stat_result]) -> str:
    return file[0]
