"""The plan: which channels of every layer stay, as a value that is pure, hashable and JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from netslim.prune.channels import ChannelMap, Layer

# strict: JSON's "3" is no 3; extra fields are a plan of another version
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0)]
_Width = Annotated[int, Field(ge=1)]
_Indices = Annotated[tuple[_Count, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Kept:
    """What stays of one BatchNorm."""

    name: str
    width: _Width
    """Channels before the cut."""
    kept: _Indices
    """Sorted indices of the channels that stay."""
    spared: _Count = 0
    """Channels no larger than the threshold that stay all the same, because the layer's floor holds them."""

    def __post_init__(self) -> None:
        _check_indices(self.name, self.kept, self.width)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Slice:
    """What stays of the input and output features of one layer with weights; None = all."""

    name: str
    num_inputs: _Width
    num_outputs: _Width
    inputs: _Indices | None = None
    outputs: _Indices | None = None

    def __post_init__(self) -> None:
        _check_indices(self.name, self.inputs or (0,), self.num_inputs)
        _check_indices(self.name, self.outputs or (0,), self.num_outputs)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Plan:
    """The channels that stay, per layer, and what that means for every layer with weights.

    Raises: ValueError on any contradiction, however the plan was made.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of all prunable gammas that the plan removes, rounded down to whole channels."""
    threshold: Annotated[float, Field(ge=0)] | None
    """Largest removed |gamma|; None where nothing is removed."""
    num_channels: _Count
    """Prunable gammas of the whole network."""
    num_removed: _Count
    layers: tuple[Kept, ...]
    """Every BatchNorm, in the order of execution."""
    slices: tuple[Slice, ...]
    """The layers that change: all that `cut` needs, so that no trace is needed to apply a plan."""

    def __post_init__(self) -> None:
        for values, what in ((self.layers, "layers"), (self.slices, "slices")):
            twice = [name for name, count in Counter(value.name for value in values).items() if count > 1]
            if twice:
                raise ValueError(f"{what} name '{twice[0]}' twice")
        removed = sum(layer.width - len(layer.kept) for layer in self.layers)
        if removed != self.num_removed or removed > self.num_channels:
            raise ValueError(f"the layers lose {removed} channels, num_removed says {self.num_removed}")
        if (self.threshold is None) != (removed == 0):
            raise ValueError(f"a threshold of {self.threshold} does not go with {removed} removed channels")
        slices = {part.name: part for part in self.slices}
        for layer in self.layers:
            part = slices.get(layer.name)
            kept = tuple(range(layer.width)) if part is None else part.outputs
            if kept != layer.kept or (part is not None and part.num_outputs != layer.width):
                raise ValueError(f"layers and slices disagree about '{layer.name}'")

    @cached_property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Sorted indices of the channels that stay, per BatchNorm."""
        return {layer.name: layer.kept for layer in self.layers}

    @cached_property
    def widths(self) -> dict[str, int]:
        """Channels before the cut, per BatchNorm."""
        return {layer.name: layer.width for layer in self.layers}

    @cached_property
    def spared(self) -> dict[str, int]:
        """Channels that only a floor holds, per BatchNorm where there are any."""
        return {layer.name: layer.spared for layer in self.layers if layer.spared}

    @property
    def digest(self) -> str:
        """The sha256 of the canonical JSON: equal plans have equal digests, in every process."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        content = TypeAdapter(Plan).dump_python(self, mode="json")
        assert isinstance(content, dict), "pydantic dumps dataclasses as dictionaries"
        return content

    def to_json(self) -> str:
        """Write the plan as JSON, its digest included."""
        return json.dumps({**self._content(), "digest": self.digest}, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan and check everything in it; ValueError, in one line, on any fault."""
        try:
            content = json.loads(text)
            digest = content.pop("digest") if isinstance(content, dict) else None
            # through JSON: in strict mode Python's lists are no tuples, JSON's arrays are
            plan = TypeAdapter(cls).validate_json(json.dumps(content))
        except KeyError:
            raise ValueError("not a plan: it has no digest") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"not a plan: {place + ': ' if place else ''}{first['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a plan: {error}") from None
        if plan.digest != digest:
            raise ValueError("the plan was changed after it was written: its digest does not match; make it again")
        return plan

    def report(self) -> str:
        """Describe the plan as a table: per layer the channels before and after, and what a floor spared."""
        rows = [("BatchNorm", "before", "after", "spared")]
        rows += [(x.name, str(x.width), str(len(x.kept)), str(x.spared or "")) for x in self.layers]
        width = max(len(name) for name, *_ in rows)
        lines = [f"{name:<{width}}  {a:>6} -> {b:>6}  {c:>6}".rstrip() for name, a, b, c in rows]
        limit = "none" if self.threshold is None else f"{self.threshold:.6g}"
        lines.append(
            f"ratio {self.ratio}: {self.num_removed} of {self.num_channels} prunable channels go; "
            f"threshold |gamma| <= {limit}; floors spare {sum(self.spared.values())}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report()


def make_plan(
    gammas: Mapping[str, Tensor],
    channels: ChannelMap,
    *,
    ratio: float,
    min_channels: int = 1,
    min_share: float = 0.0,
) -> Plan:
    """Choose the channels of smallest |gamma| over the whole network (Liu et al. 2017, section 3, arXiv 1708.06519).

    Exactly floor(ratio * N) of the N prunable gammas go: the smallest, ties by order of layers, then by channel. Every
    layer keeps max(min_channels, ceil(min_share * width)) channels or all it has; where that holds a channel, the next
    smallest goes instead. Ratios are exact decimals: 0.29 of 100 is 29.

    Args: gammas, (width,) per BatchNorm with a prunable channel; ratio in [0, 1); min_channels from 1; min_share in
    [0, 1].
    Raises: ValueError if a value is out of range, a gamma not finite or missing, or the floors do not allow the ratio.
    """
    _check_settings(ratio, min_channels, min_share)
    sizes = {layer.name: _sizes(gammas, layer) for layer in channels.layers if layer.num_prunable}
    candidates = [
        (size, order, index)
        for order, layer in enumerate(channels.layers)
        if layer.num_prunable
        for index, size in enumerate(sizes[layer.name])
        if layer.prunable[index]
    ]
    num_removed = math.floor(_exact(ratio) * len(candidates))
    floors = [max(min_channels, math.ceil(_exact(min_share) * layer.width)) for layer in channels.layers]
    rooms = _Rooms(channels, floors)
    removed: list[tuple[float, int, int]] = []
    spared: Counter[int] = Counter()
    for candidate in sorted(candidates):
        if len(removed) == num_removed:
            break
        if rooms.take(candidate[1], candidate[2]):
            removed.append(candidate)
        else:
            spared[candidate[1]] += 1
    if len(removed) < num_removed:
        raise ValueError(
            f"ratio {ratio} asks for {num_removed} of {len(candidates)} channels, but the floors "
            f"(min_channels {min_channels}, min_share {min_share}) let only {len(removed)} go; "
            f"the largest ratio possible is {len(removed) / len(candidates):.6g}"
        )
    gone = {(order, index) for _, order, index in removed}
    return Plan(
        ratio=float(ratio),
        threshold=removed[-1][0] if removed else None,
        num_channels=len(candidates),
        num_removed=num_removed,
        layers=tuple(
            Kept(
                name=layer.name,
                width=layer.width,
                kept=tuple(index for index in range(layer.width) if (order, index) not in gone),
                spared=spared[order],
            )
            for order, layer in enumerate(channels.layers)
        ),
        slices=_slices(channels, gone),
    )


class _Rooms:
    """How many channels each layer can still lose: a BatchNorm down to its floor, a producer of it down to 1."""

    def __init__(self, channels: ChannelMap, floors: list[int]) -> None:
        ends = {end.name: end for end in channels.modules}
        norms = {layer.name for layer in channels.layers}
        owners = {label: end.name for end in channels.modules if end.name not in norms for label in end.outputs}
        self._sources = [[owners.get(label) for label in ends[layer.name].inputs] for layer in channels.layers]
        self._left: Counter[int | str | None] = Counter({end.name: len(end.outputs) - 1 for end in channels.modules})
        for order, (layer, floor) in enumerate(zip(channels.layers, floors, strict=True)):
            self._left[order] = layer.width - floor

    def take(self, order: int, index: int) -> bool:
        """Take channel `index` of the layer `order`, if that leaves no one below its floor."""
        source = self._sources[order][index]
        if self._left[order] <= 0 or self._left[source] <= 0:
            return False
        self._left[order] -= 1
        self._left[source] -= 1
        return True


def _slices(channels: ChannelMap, gone: set[tuple[int, int]]) -> tuple[Slice, ...]:
    """Say what the removed gammas mean for every layer with weights."""
    ends = {end.name: end for end in channels.modules}
    norms = [ends[layer.name] for layer in channels.layers]
    labels = {label for order, index in gone for label in (norms[order].inputs[index], norms[order].outputs[index])}
    normalising = {norm.name for norm in norms}
    found = []
    for end in channels.modules:
        inputs = tuple(i for i, label in enumerate(end.inputs) if label not in labels)
        outputs = tuple(i for i, label in enumerate(end.outputs) if label not in labels)
        reads = None if end.name in normalising or len(inputs) == len(end.inputs) else inputs
        makes = None if len(outputs) == len(end.outputs) else outputs
        if reads is not None or makes is not None:
            counts = {"num_inputs": len(end.inputs), "num_outputs": len(end.outputs)}
            found.append(Slice(name=end.name, inputs=reads, outputs=makes, **counts))
    return tuple(found)


def _check_settings(ratio: float, min_channels: int, min_share: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is not in [0, 1): it is the share of all prunable channels that go")
    if min_channels < 1:
        raise ValueError(f"min_channels {min_channels} is below 1: no layer can be empty")
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share {min_share} is not in [0, 1]: it is the share of a layer's width that stays")


def _sizes(gammas: Mapping[str, Tensor], layer: Layer) -> list[float]:
    if layer.name not in gammas:
        raise ValueError(f"no gammas are given for BatchNorm '{layer.name}'")
    gamma = gammas[layer.name].detach()
    if gamma.shape != (layer.width,):
        raise ValueError(f"BatchNorm '{layer.name}' has {layer.width} channels, its gammas are {tuple(gamma.shape)}")
    if not bool(torch.isfinite(gamma).all()):
        raise ValueError(f"BatchNorm '{layer.name}' has gammas that are NaN or infinite; train again with a lower rate")
    sizes: list[float] = gamma.double().abs().tolist()  # float64 holds every smaller type exactly
    return sizes


def _exact(share: float) -> Fraction:
    """Read a share as the decimal that was written: the binary 0.29 is a little less than 29/100."""
    return Fraction(repr(float(share)))


def _check_indices(name: str, kept: tuple[int, ...], width: int) -> None:
    if any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"the kept indices of '{name}' are not sorted")
    if kept[-1] >= width:
        raise ValueError(f"the kept index {kept[-1]} of '{name}' is beyond its width {width}")
