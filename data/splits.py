"""An image set: two splits of square RGB images, and what is known of them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from netslim.data.pixels import Seen


class Split(Protocol):
    """Images by index: `(size, size, 3)` uint8 and a label in [0, number of classes)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.uint8], int]: ...

    def read(self, index: int, /) -> tuple[NDArray[np.uint8], int, Seen]:
        """The same, and what the image was like."""


@dataclass(frozen=True)
class Source:
    """An image set; the fingerprint changes when its content does."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What of it was left out, in a line each."""
