"""Numbers of channels that a network reads off its tensors, on their way through its own arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Protocol

from torch import Tensor


class Book(Protocol):
    """What learns of the comparisons that a network makes of numbers of channels."""

    def compared(self, count: Count, other: object) -> None: ...


class Count(int):
    """A number of channels that the network reads off a tensor: it shrinks with the channels that it counts.

    It has no hash: what is looked up by a number of channels is another thing once some are gone.
    """

    labels: Tensor  # (channels,)
    share: Fraction  # the number, divided by that of the labels
    book: Book

    __hash__ = None  # type: ignore[assignment]

    def __new__(cls, value: int, labels: Tensor, book: Book, share: Fraction = Fraction(1)) -> Count:
        self = super().__new__(cls, value)
        self.labels, self.share, self.book = labels, share, book
        return self

    def __mul__(self, other: int) -> int:
        if type(other) is int:
            return Count(int(self) * other, self.labels, self.book, self.share * other)
        return int(self) * int(other) if isinstance(other, int) else NotImplemented

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        whole = type(other) is int and other > 0 and int(self) % other == 0
        return Count(int(self) // other, self.labels, self.book, self.share / other) if whole else int(self) // other

    def __eq__(self, other: object) -> bool:
        self.book.compared(self, other)
        return int(self) == (int(other) if isinstance(other, Count) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: int) -> bool:
        self.book.compared(self, other)
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        self.book.compared(self, other)
        return int(self) <= int(other)

    def __gt__(self, other: int) -> bool:
        self.book.compared(self, other)
        return int(self) > int(other)

    def __ge__(self, other: int) -> bool:
        self.book.compared(self, other)
        return int(self) >= int(other)


def parts_of(value: Any, kind: type[Any]) -> list[Any]:
    """List the tensors, or counts, anywhere in the arguments of a call."""
    found: list[Any] = []
    _collect(value, kind, found)
    return found


def _collect(value: Any, kind: type[Any], found: list[Any]) -> None:
    if isinstance(value, kind):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for part in value:
            _collect(part, kind, found)
    elif isinstance(value, dict):
        for part in value.values():
            _collect(part, kind, found)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), kind, found)
