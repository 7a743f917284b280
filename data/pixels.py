"""One image file -> a square of 8-bit pixels, whatever its format, depth, orientation and shape."""

import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

Fit = Literal["crop", "pad", "stretch"]
Trait = Literal["turned", "scaled", "reduced", "opaque", "first"]
"""What reading an image took: turned upright, its grey scaled to 8 bits, its colours cut to their upper 8 bits, its
transparency left out, the first picture of several taken."""

# Files without pixels, which Pillow knows by name alone, and PostScript, which is a program to run.
_UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MOST_NAMED = 10  # files of an error
_LONGEST_REASON = 200  # characters


@dataclass(frozen=True)
class Reading:
    """How images become squares; with an image's file it is all that its pixels depend on."""

    size: int
    """Side of the square, in pixels."""
    fit: Fit = "crop"
    upright: bool = True
    white: float | None = None


@dataclass(frozen=True)
class Seen:
    """What an image was like."""

    traits: tuple[Trait, ...] = ()
    ratio: float = 1.0
    """How many times its shorter side the longer one is."""
    brightest: float = 0.0
    """The largest value of one that was scaled, and what was taken for white."""
    white: float = 0.0


class UnreadableError(ValueError):
    """Image files that cannot be read, out of `num`; a file is its path and the reason."""

    def __init__(self, files: Sequence[tuple[str, str]], num: int) -> None:
        super().__init__(files, num)
        self.files = tuple(files)
        self.num = num

    def __str__(self) -> str:
        """One line, with the first ten files."""
        if len(self.files) == 1:
            ((path, why),) = self.files
            return f"image {path} cannot be read ({why}); replace it or remove it"
        named = "; ".join(f"{path} ({why})" for path, why in self.files[:_MOST_NAMED])
        more = f"; and {len(self.files) - _MOST_NAMED:,} more" * (len(self.files) > _MOST_NAMED)
        return f"{len(self.files):,} of {self.num:,} images cannot be read: {named}{more}; replace or remove them"


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read, in the order in which Pillow tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _UNREAD)


@cache
def suffixes() -> frozenset[str]:
    """Endings of the names of image files, in lower case, with the dot."""
    known = {*formats(), "MPO"}  # which Pillow opens as a JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def read(path: str, reading: Reading) -> tuple[NDArray[np.uint8], Seen]:
    """An image file as `(size, size, 3)` uint8, and what it was like. Raises UnreadableError."""
    with _opened(path) as image:
        seen, turn = _look(image, reading)
        if "scaled" in seen.traits:
            image, brightest, white = _eight_bits(image, reading.white)
            seen = replace(seen, brightest=brightest, white=white)
        elif "reduced" in seen.traits and reading.white is not None:
            raise ValueError("of colours of 16 bits only the upper 8 are read, to which data.white does not apply")
        if turn is not None:
            image = image.transpose(turn)
        return square(image, reading.size, reading.fit), seen


def look(path: str, reading: Reading) -> Seen:
    """What an image file is like, as `read` says it, by its header alone where the format has one for all of it."""
    with _opened(path) as image:
        return _look(image, reading)[0]


def square(image: Image.Image, size: int, fit: Fit = "crop") -> NDArray[np.uint8]:
    """`image` as `(size, size, 3)` uint8.

    crop: the shorter side is resized to `size`, then the centre cut out. pad: the longer side is, with black beside it
    or above and below. stretch: each side is by itself.
    """
    if image.mode != "RGB":
        image.info.pop("transparency", None)  # which is left out, and which Pillow would warn of
        image = image.convert("RGB")
    width, height = image.size
    if fit == "stretch":
        width = height = size
    elif (side := min(width, height) if fit == "crop" else max(width, height)) != size:
        least = size if fit == "crop" else 1
        width, height = (max(least, round(length * (size / side))) for length in (width, height))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if (width, height) != (size, size):
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))  # what lies outside is black
    return np.asarray(image)


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image, for as long as it is read. Raises UnreadableError for whatever goes wrong meanwhile."""
    try:
        with open(path, "rb") as file:
            # In one read: Pillow's many small ones pass Python's lock around, twice as slow with two threads.
            content = file.read()
        if not content:
            raise ValueError("it is empty")
        with hush, Image.open(io.BytesIO(content), formats=formats()) as image:
            yield image
    except Exception as error:  # the plug-ins raise whatever a foreign or truncated file brings them to
        raise UnreadableError([(path, _reason(error))], 1) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow knows"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:_LONGEST_REASON]


class _Hush:
    """Keeps Pillow from warning, while any thread is in it: of odd metadata, which change no pixel.

    It is quicker entered once for many images.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._caught: Any = None

    def __enter__(self) -> None:
        with self._lock:  # the filters are the whole process's: each thread's own would come back in the wrong order
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


hush = _Hush()


def _look(image: Image.Image, reading: Reading) -> tuple[Seen, Image.Transpose | None]:
    """What the image is like, and how it has to be turned."""
    traits: list[Trait] = []
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        traits.append("scaled")
    elif _stored_bits(image) > 8:
        traits.append("reduced")
    if image.has_transparency_data:
        traits.append("opaque")
    if getattr(image, "is_animated", False):
        traits.append("first")
    turn = _UPRIGHT.get(_orientation(image)) if reading.upright else None  # last: a PNG may say it behind its pixels
    if turn is not None:
        traits.append("turned")
    width, height = image.size
    return Seen(tuple(traits), max(width, height) / min(width, height)), turn


def _orientation(image: Image.Image) -> int:
    """By EXIF or XMP, from 1 (upright) to 8."""
    if image.format == "TIFF":
        return 1  # Pillow itself turns these
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as of files; viewers show an image with damaged metadata as it is stored
        return 1


def _stored_bits(image: Image.Image) -> int:
    """Bits per value in the file, where Pillow's decoder is told of 16 of them; else 8."""
    words = (tile[3] if isinstance(tile[3], str) else (tile[3] or [""])[0] for tile in getattr(image, "tile", ()))
    return 16 if any(";16" in str(word) for word in words) and image.mode != "P" else 8


def _eight_bits(image: Image.Image, white: float | None) -> tuple[Image.Image, float, float]:
    """A grey image of integers of more than 8 bits, or of floats, from [0, white] to [0, 255], rounded.

    Its largest value and white come with it. Raises ValueError for values outside, and where white is not known.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    kind = "floats" if image.mode == "F" else "integers"
    known = _white(image) if white is None else white
    if known is None:
        raise ValueError(f"its {kind} from {low:g} to {high:g} do not say what is white; name it with --data.white")
    if not (low >= 0 and high <= known):  # written so that NaN does not pass
        remedy = "name another value for white with --data.white" if low >= 0 else "scale them"
        raise ValueError(f"its {kind} from {low:g} to {high:g} are not within 0 and {known:g}; {remedy}")
    if image.format == "TIFF" and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0:  # type: ignore[attr-defined]  # white is zero
        values = known - values
    return Image.fromarray(np.floor(values * (255 / known) + 0.5).astype(np.uint8)), high, known


def _white(image: Image.Image) -> float | None:
    """The value that is white by the file's type; None: that says nothing."""
    if image.mode == "F":
        return 1.0
    if image.format == "TIFF":
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0]  # type: ignore[attr-defined]
        signed = image.tag_v2.get(ExifTags.Base.SampleFormat, (1,))[0] == 2  # type: ignore[attr-defined]
        return 2.0 ** (bits - signed) - 1 if bits <= 16 else None
    if image.mode != "I" or image.format in ("PNG", "PPM"):  # whose 16 bits Pillow gives as 32
        return 65535.0
    return None
