"""Any folder of images, one sub-folder per class; and how one image becomes a square of pixels."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """`image` as `(size, size, 3)` uint8: the shorter side resized to `size`, then the centre cut out."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    width, height = image.size
    if min(width, height) != size:
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    if (width, height) != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


@dataclass(frozen=True)
class FolderSplit:
    """Image files, decoded when asked for. Raises ValueError, naming the file, for one that cannot be read."""

    root: str
    names: list[str]  # relative to root
    labels: list[int]
    size: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        path = os.path.join(self.root, self.names[index])
        try:
            with open(path, "rb") as file:
                # In one read: Pillow's many small ones pass Python's lock around, twice as slow with two threads.
                content = io.BytesIO(file.read())
            with Image.open(content) as image:
                return square(image, self.size), self.labels[index]
        # Pillow's plug-ins raise all of these, by format, for truncated or foreign files.
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {path} cannot be read ({error}); replace it or remove it") from error


def looks_like_images(root: Path) -> bool:
    """Whether `root` has the layout that the source "folder" reads."""
    return (root / "train").is_dir() and any((root / name).is_dir() for name in ("test", "val"))


def scan(root: Path, size: int) -> tuple[FolderSplit, FolderSplit, tuple[str, ...], str]:
    """The train split, the test split, the classes and the fingerprint (names, sizes and times of all files).

    Raises FileNotFoundError when a folder is missing, ValueError when classes are empty or differ.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; name the folder that holds train/ with --data.root")
    if not (root / "train").is_dir():
        raise FileNotFoundError(f"no folder {root / 'train'}; images belong in train/<class>/ below --data.root")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise FileNotFoundError(f"neither test/ nor val/ in {root}; put images to test with in test/<class>/")
    digest = hashlib.sha256()
    classes = _classes(root / "train")
    found = _classes(test)
    if found != classes:
        odd = sorted(set(classes) ^ set(found))
        raise ValueError(f"train/ and {test.name}/ of {root} must hold the same classes; only one has: {odd[:5]}")
    return (
        _split(root / "train", classes, size, digest),
        _split(test, classes, size, digest),
        classes,
        digest.hexdigest(),
    )


def _classes(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        classes = tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))
    if not classes:
        raise ValueError(f"no class folders in {folder}; images belong in {folder}/<class>/")
    return classes


def _split(folder: Path, classes: tuple[str, ...], size: int, digest: "hashlib._Hash") -> FolderSplit:
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        with os.scandir(folder / name) as entries:
            files = sorted((e for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file()), key=_name)
        if not files:
            kinds = " ".join(suffix[1:] for suffix in SUFFIXES)
            raise ValueError(f"no images in {folder / name} (of {kinds}); add some or remove the class everywhere")
        for entry in files:
            status = entry.stat()
            digest.update(f"{folder.name}/{name}/{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        names += [f"{name}/{entry.name}" for entry in files]
        labels += [label] * len(files)
    return FolderSplit(str(folder), names, labels, size)


def _name(entry: "os.DirEntry[str]") -> str:
    return entry.name
