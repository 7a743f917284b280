"""Named image sets, each as an indexable train and test split of square RGB images."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Interval
from numpy.typing import NDArray
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from netslim.base import exclusive, plainly
from netslim.data import folder
from netslim.data.pixels import Fit, Reading, Seen, square
from netslim.data.splits import Source

SourceName = Literal["digits", "cifar10", "cifar100", "folder"]


def default_cache() -> Path:
    """Where .beton files go unless told: XDG_CACHE_HOME/netslim, else ~/.cache/netslim.

    Where the system knows no home for this user, as in some containers, a folder among the temporary files.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "netslim" if os.path.isabs(base) else spare_cache()


def spare_cache() -> Path:
    """The cache of a user without a home: what is among the temporary files may be gone tomorrow."""
    return Path(tempfile.gettempdir(), f"netslim-{os.getuid()}")


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DataConfig:
    """Which images, how they are stored, and how they become batches."""

    source: SourceName = "digits"
    """Image set; "folder" is any train/<class>/** with test/, val/, valid/ or validation/ of the same classes."""
    root: Path | None = None
    """Folder of the images; for cifar10 and cifar100 the one that torchvision uses (default: in the cache)."""
    download: bool = False
    """Allow torchvision to download cifar10 or cifar100."""
    cache: Path = field(default_factory=default_cache)
    """Where .beton files are written and found again."""
    size: Annotated[int, Interval(ge=8, le=512)] = 32
    """Side of the stored square images, in pixels."""
    fit: Fit = "crop"
    """How an oblong image becomes a square. crop: its centre, by which its ends are lost; pad: all of it, with black
    beside it; stretch: all of it, distorted."""
    upright: bool = True
    """Turn images as their EXIF orientation says, as viewers show them; off: as they are stored, as torchvision reads
    them. Folder only."""
    white: Annotated[float, Gt(0)] | None = None
    """Value that is white in grey images of more than 8 bits or of floats, such as 4095 for 12 bits; None = by the
    file's type: 65535 for 16 bits, 1 for floats. Folder only."""
    batch_size: Annotated[int, Ge(1)] = 128
    """Images per optimizer step, over all ranks and accumulation steps."""
    eval_batch_size: Annotated[int, Ge(1)] = 256
    """Images per evaluation batch, per rank."""
    flip: bool = True
    """Mirror half of the training images, left to right."""
    pad: Annotated[int, Ge(0)] = 4
    """Move training images by up to this many pixels, filled with the mean colour; 0 = off."""
    loader: Literal["auto", "ffcv", "torch", "device"] = "auto"
    """Which loader; auto = ffcv where it can be imported, else torch; device = all images stay on the GPU, for sets
    that fit there. Their pixels are the same."""
    num_workers: Annotated[int, Ge(0)] = 1
    """Threads (ffcv, at least 1) or processes (torch, where 0 = none of its own) that decode, per rank."""
    quality: Annotated[int, Interval(ge=1, le=100)] | None = None
    """JPEG quality in the .beton, for large images; None = raw pixels: larger, faster, exact. Ffcv only."""

    def __post_init__(self) -> None:
        if self.pad >= self.size:
            raise ValueError(f"pad {self.pad} moves images of size {self.size} out of sight; try {self.size // 8}")

    @property
    def unread(self) -> dict[str, str]:
        """The fields that nothing reads beside the others, and why."""
        of_folders = ("upright", "white") if self.source != "folder" else ()
        of_files = {"digits": ("root", "download"), "folder": ("download",)}.get(self.source, ())
        of_loader = {"torch": ("quality",), "device": ("quality", "num_workers")}.get(self.loader, ())
        return dict.fromkeys((*of_folders, *of_files), f"source is {self.source}") | dict.fromkeys(
            of_loader, f"loader is {self.loader}"
        )

    @property
    def reading(self) -> Reading:
        """How an image becomes a square of pixels."""
        return Reading(self.size, self.fit, self.upright, self.white)


@plain_dataclass(frozen=True)
class ArraySplit:
    """Images held in memory, `(n, height, width)` grey or `(n, height, width, 3)`, enlarged when asked for."""

    images: NDArray[np.uint8]
    labels: Sequence[int]
    reading: Reading

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        image = Image.fromarray(self.images[index])
        return square(image, self.reading.size, self.reading.fit), int(self.labels[index])

    def read(self, index: int) -> tuple[NDArray[np.uint8], int, Seen]:
        """With nothing to say of the image: these are square, upright, and of 8 bits."""
        return *self[index], Seen()


def open_source(config: DataConfig) -> Source:
    """The images that `config` names.

    Raises ValueError or FileNotFoundError when they are missing or unusable.
    """
    match config.source:
        case "digits":
            return _digits(config.reading)
        case "folder":
            return _folder(config)
        case "cifar10" | "cifar100":
            return _cifar(config)


def _digits(reading: Reading) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; every 5th of each class is for testing."""
    from sklearn.datasets import load_digits  # here: its import takes a second that no other source needs

    raw = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)  # the file counts grey levels from 0 to 16
    labels = raw.target.astype(np.int64)
    rank = np.zeros(len(labels), dtype=np.int64)  # of each sample within its class
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.count_nonzero(labels == label))
    test = rank % 5 == 4
    return Source(
        train=ArraySplit(images[~test], labels[~test].tolist(), reading),
        test=ArraySplit(images[test], labels[test].tolist(), reading),
        classes=tuple(str(name) for name in raw.target_names),
        fingerprint=hashlib.sha256(images.tobytes() + labels.tobytes() + test.tobytes()).hexdigest(),
    )


def _folder(config: DataConfig) -> Source:
    if config.root is None:
        raise ValueError("source folder needs the folder of the images; add --data.root DIR")
    return folder.scan(config.root, config.reading)


def _cifar(config: DataConfig) -> Source:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) in torchvision's own layout."""
    from torchvision import datasets

    kind: Any = datasets.CIFAR10 if config.source == "cifar10" else datasets.CIFAR100
    root = config.root or config.cache / "torchvision"
    try:
        if config.download:
            root.mkdir(parents=True, exist_ok=True)
            with exclusive(root / f"{config.source}.lock"):  # one process downloads, the others find it there
                kind(root, train=True, download=True)
        train, test = kind(root, train=True), kind(root, train=False)
    except RuntimeError as error:  # torchvision's word for "not there"
        if folder.looks_like_images(root):
            raise ValueError(
                f"{root} holds folders of images, not torchvision's {config.source}; use --data.source folder"
            ) from None
        raise FileNotFoundError(
            f"no {config.source} under {root} ({error}); add --data.download, or name its folder with --data.root"
        ) from None
    return Source(
        train=ArraySplit(train.data, train.targets, config.reading),
        test=ArraySplit(test.data, test.targets, config.reading),
        classes=tuple(train.classes),
        fingerprint=str(kind.tgz_md5),
    )
