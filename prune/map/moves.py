"""Operations that move data, executed on labels; and what makes them do the same once channels are gone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from netslim.prune.map import operations as ops
from netslim.prune.map.classes import Classes, along, compact, distinct, line, tight, varying

Leaf = TypeVar("Leaf")


class Count(int):
    """A number of channels that the network reads off a tensor: it shrinks with the channels that it counts."""

    labels: Tensor  # (channels,)
    share: Fraction  # the number, divided by that of the labels

    def __new__(cls, value: int, labels: Tensor, share: Fraction = Fraction(1)) -> Count:
        self = super().__new__(cls, value)
        self.labels, self.share = labels, share
        return self

    def __mul__(self, other: int) -> int:
        return Count(int(self) * other, self.labels, self.share * other) if type(other) is int else NotImplemented

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        whole = type(other) is int and other > 0 and int(self) % other == 0
        return Count(int(self) // other, self.labels, self.share / other) if whole else int(self) // other


def sizes(labels: Tensor) -> tuple[int, ...]:
    """Give the shape of a value, the dimensions that hold channels as counts of these."""
    vary = varying(labels)
    return tuple(Count(n, line(labels, d)) if d in vary else n for d, n in enumerate(labels.shape))


def leaves(value: Any, kind: type[Leaf]) -> list[Leaf]:
    """List the tensors, or counts, anywhere in a value: one, or a structure of several."""
    found: list[Leaf] = []
    map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, kind) else None)
    return found


class Moves:
    """Follows labels through operations that move data, and remembers the counts of channels to check at the end."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self._promises: list[tuple[Count, Tensor, str]] = []

    def move(
        self, node: fx.Node, module: nn.Module | None, name: str, args: Any, kwargs: Any, value: Any
    ) -> tuple[Any, str | None]:
        """Execute the operation on the labels; say why if it would do something else once channels are gone."""
        try:
            made = ops.apply_to_labels(node, name, module, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None, f"'{name}' with these arguments"
        made = map_aggregate(made, lambda t: tight(t) if isinstance(t, Tensor) else t)
        before, after = leaves((args, kwargs), Tensor), leaves(made, Tensor)
        if [t.shape for t in after] != [t.shape for t in leaves(value, Tensor)]:
            return None, f"'{name}' with these arguments"
        why = None
        if name == "squeeze" and len(args) + len(kwargs) == 1:
            why = "'squeeze' without a dimension (it would drop a single channel; use flatten(1))"
        elif name in ops.RESHAPING and name != "flatten" and module is None:
            why = self._reshaped(name, _asked_sizes(args, kwargs), after[0])
        elif name in ops.CHOOSING:
            why = self._chosen(name, args, kwargs, before[0], after)
        if why is None and any(len(self._spread(t)) > 1 for t in (*before, *after)):
            why = f"'{name}' lays channels over two dimensions"
        return made, why

    def shuffle(self, labels: Tensor, groups: int) -> tuple[Tensor | None, str | None]:
        """Take labels through a shuffle of equal groups of channels, which stay equal."""
        if varying(labels) != {1} or isinstance(groups, Count):
            return None, "'channel_shuffle' of something else than whole channels"
        parts = line(labels, 1).view(groups, -1)
        self.classes.join(parts, parts[:1].expand_as(parts))
        return along(parts.t().flatten(), 1, labels.shape), None

    def settle(self) -> None:
        """Keep the channels whose number the network computes from that of other channels."""
        roots = self.classes.roots()
        for count, labels, place in self._promises:
            counted, laid = roots[count.labels.numpy()], roots[labels.numpy()]
            low = min(int(counted.min()), int(laid.min()))
            tally = np.bincount(counted - low, minlength=int(laid.max()) - low + 1)
            other = np.bincount(laid - low, minlength=len(tally))
            if not np.array_equal(tally * count.share.numerator, other * count.share.denominator):
                for part in (count.labels, labels):
                    self.classes.freeze(part, f"{place} counts other channels")

    def _spread(self, labels: Tensor) -> set[int]:
        """Name the dimensions along which channels vary that do not live or die together."""
        if len(varying(labels)) < 2:
            return varying(labels)
        return varying(tight(torch.from_numpy(self.classes.roots()[labels.numpy()])))

    def _reshaped(self, name: str, asked: Sequence[Any], labels: Tensor) -> str | None:
        """Bind channels along dimensions whose size is written down; one dimension may shrink with its channels."""
        vary = varying(labels)
        written = {d for d in vary if d < len(asked) and not isinstance(asked[d], Count) and asked[d] != -1}
        if len(vary) == 1 and written:
            return f"the number of channels is written into '{name}' (use flatten(1) or -1)"
        for dim in written if len(vary - written) == 1 else ():
            some = compact(labels)
            self.classes.join(some, some.narrow(dim, 0, 1).expand_as(some))
        if len(vary) > 1 and len(vary - written) != 1:
            return f"'{name}' lays channels over two dimensions"
        for dim in vary - written:
            if isinstance(asked[dim], Count):
                self._promises.append((asked[dim], line(labels, dim), f"'{name}'"))
        return None

    def _chosen(self, name: str, args: Any, kwargs: Any, labels: Tensor, after: list[Tensor]) -> str | None:
        """Bind the parts of a chunk or split in equal parts; other choices along the channels freeze them."""
        if name == "getitem" and not _is_plain_index(args[1]):
            return "'getitem' chooses by a list or tensor"
        whole = distinct(labels)
        if all(np.array_equal(distinct(t), whole) for t in after):
            return None
        size = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
        equal = len(after) > 1 and len({t.shape for t in after}) == 1
        if name == "getitem" or not equal or (name == "split" and not isinstance(size, Count)):
            return f"'{name}' chooses channels by position"
        for part in after[1:]:
            self.classes.join(compact(after[0]), compact(part))
        if isinstance(size, Count) and name == "split":
            self._promises.append((size, compact(after[0]).flatten(), f"'{name}'"))
        return None


def _asked_sizes(args: Any, kwargs: Any) -> Sequence[Any]:
    asked = kwargs.get("shape", kwargs.get("size", args[1:]))
    if len(asked) == 1 and isinstance(asked[0], (tuple, list)):
        asked = asked[0]
    return tuple(asked)


def _is_plain_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts)
