"""Numbers of channels that a network reads off its tensors, on their way through its own arithmetic."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Protocol

from torch import Tensor

from netslim.prune.record import words

Term = tuple[Tensor, Fraction]
"""Labels of channels (channels,), and what each of them counts."""


class Book(Protocol):
    """What learns what a network does with numbers of channels, besides asking for so many of them."""

    hashes: bool
    """Whether a number of channels may be looked up: then it has to stay."""

    def promise(self, terms: Sequence[Term], what: str, multiple: int = 0) -> None:
        """Learn that a sum of numbers of channels has to stay, or to stay a multiple of something."""


class Count(int):
    """A number of channels that the network reads off a tensor: it shrinks with the channels that it counts.

    Times a number, or divided without a rest, it stays a count. All else makes plain numbers of it, which have to stay
    what they are: the book is told. Only Python's own counting (`range`, indices, text) is not seen.
    """

    labels: Tensor  # (channels,)
    share: Fraction  # the number, divided by that of the labels
    book: Book

    def __new__(cls, value: int, labels: Tensor, book: Book, share: Fraction = Fraction(1)) -> Count:
        self = super().__new__(cls, value)
        self.labels, self.share, self.book = labels, share, book
        return self

    @property
    def term(self) -> Term:
        return self.labels, self.share

    def __hash__(self) -> int:
        if not self.book.hashes:
            raise TypeError(UNHASHABLE)  # libraries that cache by sizes then compute anew
        self.book.promise([self.term], "looked up by")
        return int.__hash__(self)

    def __mul__(self, other: Any) -> Any:
        if type(other) is int:
            return Count(plain(self) * other, self.labels, self.book, self.share * other)
        return _escaped(operator.mul, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if type(other) is int and other > 0 and plain(self) % other == 0:
            return Count(plain(self) // other, self.labels, self.book, self.share / other)
        return _escaped(operator.floordiv, self, other)

    def __mod__(self, other: Any) -> Any:
        if type(other) is int and other > 0 and plain(self) % other == 0:
            self.book.promise([self.term], "divided without a rest by", other)
            return 0
        return _escaped(operator.mod, self, other)

    def __add__(self, other: Any) -> Any:
        return _combined(operator.add, self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _combined(operator.sub, self, other, -1)

    def __eq__(self, other: object) -> bool:
        return _compared(operator.eq, self, other)

    def __ne__(self, other: object) -> bool:
        return _compared(operator.ne, self, other)

    def __lt__(self, other: int) -> bool:
        return _compared(operator.lt, self, other)

    def __le__(self, other: int) -> bool:
        return _compared(operator.le, self, other)

    def __gt__(self, other: int) -> bool:
        return _compared(operator.gt, self, other)

    def __ge__(self, other: int) -> bool:
        return _compared(operator.ge, self, other)


UNHASHABLE = "unhashable type: 'Count'"


def plain(value: Any) -> Any:
    """Make a plain number of a count, which tells nobody."""
    return int.__int__(value) if isinstance(value, Count) else value


def _escaped(function: Callable[..., Any], *values: Any) -> Any:
    """Compute with plain numbers: the counts among them have to stay."""
    counts = [value for value in values if isinstance(value, Count)]
    for count in counts:
        count.book.promise([count.term], "computed with")
    return function(*map(plain, values))


def _combined(function: Callable[..., Any], count: Count, other: Any, sign: int) -> Any:
    """Add or subtract: what has to stay is the result, such as the channels that one value has and another has not."""
    terms = [count.term]
    if isinstance(other, Count):
        terms.append((other.labels, sign * other.share))
    count.book.promise(terms, "computed with")
    return function(plain(count), plain(other))


def _compared(function: Callable[..., bool], count: Count, other: Any) -> bool:
    """Compare: the answer has to stay what it is. With zero it does: every layer keeps a channel."""
    if isinstance(other, Count) or (isinstance(other, (int, float)) and other > 0):
        terms = [count.term, (other.labels, -other.share)] if isinstance(other, Count) else [count.term]
        count.book.promise(terms, "compared")
    return function(plain(count), plain(other))


def _escaping(name: str) -> Any:
    function = getattr(int, name)

    def method(self: Count, *others: Any) -> Any:
        return _escaped(function, self, *others)

    return method


_ESCAPING = words(
    "rsub pow rpow truediv rtruediv rfloordiv rmod divmod rdivmod and rand or ror xor rxor lshift rshift neg abs "
    "invert float int round"
)
for _name in _ESCAPING:
    setattr(Count, f"__{_name}__", _escaping(f"__{_name}__"))


def asks_itself() -> bool:
    """Tell whether it is a module of torch's that compares, with a size that a cut tells it anew."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename.endswith(_TOLD)


_TOLD = os.path.join("torch", "nn", "modules", "instancenorm.py")
