"""Channel classes: which labels live or die together, what holds them, and which are not zero once they are removed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

CONSTANT = 0  # the label of everything that is no channel
UNNORMALISED = 1  # index of the reason of values that no BatchNorm of their class sets to zero


class Classes:
    """Labels, and what is known about them while the network runs on them.

    A label is *raw* if its value can differ from zero although gamma and beta of every BatchNorm that makes its class
    are zero: then a layer that reads it would notice the removal.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raw = np.zeros(1 << 12, np.int64)
        self._free: list[tuple[int, int]] = []
        self._causes = ["", "not normalised"]
        self._root: Ints = np.zeros(0, np.int64)
        self._pairs: list[tuple[Ints, Ints]] = []
        self._holds: list[tuple[Ints, str]] = []
        self.freeze(self.fresh(1, UNNORMALISED), "a constant of the network")

    def fresh(self, count: int, raw: int | Ints = 0) -> Tensor:
        """Make new labels, (count,) int64, each a class of its own; raw: 0, or the index of what makes them raw."""
        start, self.count = self.count, self.count + count
        if self.count > len(self._raw):
            self._raw = np.concatenate([self._raw, np.zeros(self.count, np.int64)])
        self._raw[start : self.count] = raw
        return torch.arange(start, self.count, device="cpu")  # whatever the default device is

    def of_parameter(self, shape: torch.Size) -> Tensor:
        """Make a label for every element of a parameter: which of them are one channel, its readers tell."""
        made = self.fresh(shape.numel(), UNNORMALISED)
        self._free.append((self.count - shape.numel(), self.count))
        return made.view(shape)

    def is_free(self, labels: Tensor) -> bool:
        """Tell whether these are labels of a parameter's elements, so that one channel may have many of them."""
        if not self._free or not labels.numel():
            return False
        some = compact(labels)
        low, high = int(some.min()), int(some.max())
        return any(start <= low and high < end for start, end in self._free)

    def cause(self, text: str) -> int:
        """Note what makes values raw, and return its index."""
        self._causes.append(text)
        return len(self._causes) - 1

    def text(self, cause: int) -> str:
        """Give the text of what makes values raw."""
        return self._causes[cause]

    def raw(self, labels: Tensor) -> Ints:
        """Look up, label by label, the index of what makes it raw; 0 = zero once removed."""
        raw: Ints = self._raw[labels.numpy()]
        return raw

    def join(self, left: Tensor, right: Tensor) -> None:
        """Let labels of equal shape live or die together, pair by pair; what meets a constant stays."""
        a, b = left.flatten().numpy(), right.flatten().numpy()
        constant = (a == CONSTANT) | (b == CONSTANT)
        if constant.any():
            self._holds.append((np.concatenate([a[constant], b[constant]]), "joined with a constant of the network"))
            a, b = a[~constant], b[~constant]
        self._pairs.append((a, b))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Keep the classes of these labels for good; the first reason stays."""
        self._holds.append((distinct(labels), reason))

    def read(self, labels: Tensor, name: str) -> None:
        """Let a layer that mixes channels read labels (count,): those that are raw have to stay."""
        raw = self.raw(labels)
        for cause in np.unique(raw[raw > 0]).tolist():
            text = f"read before its BatchNorm by {name}" if cause == UNNORMALISED else self._causes[cause]
            self._holds.append((labels.numpy()[raw == cause], text))

    def roots(self) -> Ints:
        """Map every label to the smallest of its class, (count,)."""
        self._root = np.concatenate([self._root, np.arange(len(self._root), self.count)])
        if self._pairs:
            left, right = (np.concatenate(side) for side in zip(*self._pairs, strict=True))
            self._root = merged(self._root, left, right)
            self._pairs = []
        return self._root

    def holds(self) -> tuple[Ints, list[str]]:
        """Say per root which reason holds its class: (count,) indices into the reasons, their number where none does.

        Whole labels that are no roots have none of their own.
        """
        roots = self.roots()
        first = np.full(self.count, len(self._holds))
        for order, (labels, _) in enumerate(self._holds):
            np.minimum.at(first, roots[labels], order)
        return first, [reason for _, reason in self._holds]


def merged(root: Ints, left: Ints, right: Ints) -> Ints:
    """Unite sets pair by pair: root maps every element to the smallest of its set, before and after."""
    root = root.copy()
    while True:
        a, b = root[left], root[right]
        apart = a != b
        if not apart.any():
            return root
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, jumped := root[root]):
            root = jumped


def varying(labels: Tensor) -> set[int]:
    """Name the dimensions along which labels vary: all others are expanded (stride 0)."""
    return {dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim) != 0}


def compact(labels: Tensor) -> Tensor:
    """Narrow labels to one along each dimension in which they do not vary."""
    vary = varying(labels)
    for dim in range(labels.dim()):
        if dim not in vary:
            labels = labels.narrow(dim, 0, min(1, labels.shape[dim]))
    return labels


def distinct(labels: Tensor) -> Ints:
    """List the labels that occur, each once."""
    return np.unique(compact(labels).flatten().numpy())


def tight(labels: Tensor) -> Tensor:
    """Expand labels along each dimension in which they are all alike."""
    shape = labels.shape
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, min(1, labels.shape[dim]))
        if labels.shape[dim] > 1 and (labels.stride(dim) == 0 or torch.equal(labels, first.expand_as(labels))):
            labels = first
    return labels.expand(shape)


def line(labels: Tensor, dim: int) -> Tensor:
    """Read the labels along one dimension."""
    return labels[tuple(slice(None) if d == dim else 0 for d in range(labels.dim()))]


def along(labels: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Lay a line of labels along one dimension of a value."""
    return labels.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
