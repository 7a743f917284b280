"""The layers of a channel map: each BatchNorm with what holds its gammas, each layer with weights with its channels."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from netslim.prune.map.classes import Classes, line, varying
from netslim.prune.record import Call, Record

Coupling = Literal["group", "select"]
"""group: gammas of one class live or die together; select: each by itself, with index selections where needed."""


@dataclass(frozen=True)
class Layer:
    """One BatchNorm of the map: gamma i belongs to its channel i."""

    name: str
    classes: tuple[int, ...]
    """(width,): gammas of equal number, in any layer, share channels, so that only together they leave no trace."""
    holds: tuple[str, ...]
    """(width,): why the channel stays; empty = it can be removed together with all gammas of its class."""
    selects: tuple[bool, ...]
    """(width,): whether the gamma can be removed by itself, with index selections around the BatchNorm, and a layer
    beside it shrinks with it."""
    shift: str | None = None
    """The parameter that is the beta, where the BatchNorm is no module of torch's form; `name` is then the gamma's."""

    @property
    def width(self) -> int:
        return len(self.classes)

    @cached_property
    def prunable(self) -> tuple[bool, ...]:
        """Tell for each channel, (width,), whether it can be removed."""
        return tuple(map(operator.not_, self.holds))

    @property
    def selectable(self) -> bool:
        """Tell whether gammas can be removed one by one."""
        return any(self.selects)

    @property
    def num_prunable(self) -> int:
        return sum(self.prunable)

    @property
    def reasons(self) -> tuple[tuple[str, int], ...]:
        """Say why the channels that are not prunable stay, each reason with the number of channels it holds."""
        return tuple(Counter(why for why in self.holds if why).items())

    def removable(self, coupling: Coupling) -> tuple[bool, ...]:
        """Tell for each gamma, (width,), whether it can be removed under this coupling."""
        return self.prunable if coupling == "group" else self.selects


@dataclass(frozen=True)
class Ends:
    """The channels at the two ends of a convolution, linear layer or BatchNorm; equal numbers are one channel."""

    name: str
    kind: str
    """The type of the layer, as in `Conv2d`."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Loose:
    """A parameter or buffer that no layer of torch's form resizes, and the channels along its dimensions."""

    name: str
    dims: tuple[tuple[int, ...] | None, ...]
    """Per dimension the numbers of its channels; None, as for dimensions that are left out, = it stays."""


Dims = tuple[Tensor | None, ...]
"""Per dimension of a tensor the labels of its channels; None = it has none."""


@dataclass(frozen=True)
class Bond:
    """One call of a function with weights."""

    call: Call
    given: Mapping[str, Any]
    """Its arguments by name."""
    own: Mapping[str, str]
    """The names of those that are parameters or buffers; empty for other tensors."""
    labels: Mapping[str, Tensor]
    """Of the input, and of the other tensors."""
    shape: torch.Size
    """Of what came out."""
    place: Callable[[], str]
    """Names the line of the call."""


@dataclass
class Use:
    """A convolution, linear layer or BatchNorm: the labels that it reads and makes, at its first call."""

    names: tuple[str, ...]
    """The modules whose layer it is; or, where its tensors belong to a module of another form, that of its weight."""
    kind: str
    normalises: bool
    inputs: Tensor  # (features,), CONSTANT where there is none that could be cut
    outputs: Tensor  # (features,)
    shift: str | None = None
    """The beta of a BatchNorm whose gamma is no module's weight."""
    is_selectable: bool = True
    tensors: dict[str, Dims] = field(default_factory=dict)
    """Parameters and buffers that are no module's of `names` -> what their dimensions are."""


def see_selectable(uses: Iterable[Use], classes: Classes, record: Record, labels: Mapping[int, Tensor]) -> None:
    """See, once a run is over, which BatchNorms a selection can stand around: modules that hand channels through.

    What goes into the module has to be what is normalised, and what comes out the same channels, zero where gamma
    and beta are: an activation may follow within.
    """
    roots = classes.roots()
    calls: dict[str, list[Call]] = {}
    for call in record.calls:
        if call.name == "batch_norm":
            calls.setdefault(call.home, []).append(call)
    for use in (use for use in uses if use.normalises):
        for name in use.names:
            own, passages = calls.get(name, []), record.passages.get(name, [])
            use.is_selectable &= len(use.names) == 1 and len(own) == len(passages)
            for call, passage in zip(own, passages, strict=False):
                whole = len(passage.inputs) == len(passage.outputs) == 1
                through = whole and passage.inputs[0] == call.inputs[0]
                made, out = labels.get(call.outputs[0]), labels.get(passage.outputs[0]) if through else None
                if made is None or out is None or varying(out) != varying(made):
                    use.is_selectable = False
                elif out is not made:
                    lines = line(out, 1), line(made, 1)
                    alike = np.array_equal(roots[lines[0].numpy()], roots[lines[1].numpy()])
                    use.is_selectable &= bool(alike and not classes.raw(lines[0]).any())


def few(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """List the first names and say how many more there are: networks have hundreds of layers."""
    rest = len(names) - most
    return between.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Give the lines of a table; a column is set to the side that its letter says, < or >."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
