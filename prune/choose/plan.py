"""The plan: which channels of every layer stay, as a value that is pure, hashable and JSON."""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from functools import cached_property
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from netslim.base import complaint, plainly
from netslim.prune.choose.origin import Origin
from netslim.prune.choose.rules import Rules

# strict: JSON's "3" is no 3; extra fields are a plan of another version
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0)]
_Width = Annotated[int, Field(ge=1)]
_Indices = Annotated[tuple[_Count, ...], Field(min_length=1)]


@plainly
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
    restored: _Count = 0
    """Channels that stay because the layer's width is rounded up."""
    shift: str | None = None
    """The parameter that is the beta, where the BatchNorm is no module of torch's form; `name` is then the gamma's."""

    def __post_init__(self) -> None:
        _check_indices(self.name, self.kept, self.width)


@plainly
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


@plainly
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Selection:
    """What stands around a BatchNorm that loses gammas whose channels stay; None = nothing."""

    name: str
    num_before: _Width
    """Channels that arrive, in the cut network."""
    num_after: _Width
    """Channels that leave, in the cut network."""
    before: _Indices | None = None
    """Which of the arriving channels the BatchNorm reads."""
    after: _Indices | None = None
    """At which of the leaving channels its results are; zeros at the others."""

    def __post_init__(self) -> None:
        if self.before is None and self.after is None:
            raise ValueError(f"the selection around '{self.name}' selects nothing")
        _check_indices(self.name, self.before or (0,), self.num_before)
        _check_indices(self.name, self.after or (0,), self.num_after)


@plainly
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Trim:
    """What stays of one dimension of a parameter or buffer that is none of a layer of torch's form."""

    name: str
    dim: _Count
    size: _Width
    """Along this dimension, before the cut."""
    kept: _Indices

    def __post_init__(self) -> None:
        _check_indices(self.name, self.kept, self.size)


@plainly
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Plan:
    """The channels that stay, per layer, and what that means for every layer with weights.

    Raises: ValueError on any contradiction, however the plan was made.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the rules' target that was asked to go."""
    rules: Rules
    threshold: Annotated[float, Field(ge=0)] | None
    """Largest removed |gamma|, or score of a class of them; None where nothing is removed."""
    num_channels: _Count
    """Prunable gammas of the whole network."""
    num_asked: _Count
    """The ratio in whole gammas, rounded down."""
    num_removed: _Count
    """Fewer than asked where no whole class fits into the rest, or where rounding gives channels back."""
    layers: tuple[Kept, ...]
    """Every BatchNorm, in the order of execution."""
    slices: tuple[Slice, ...]
    """The layers that change: all that `cut` needs, so that no trace is needed to apply a plan."""
    selections: tuple[Selection, ...] = ()
    """Where channels are selected before a BatchNorm or put back after it."""
    trims: tuple[Trim, ...] = ()
    """The tensors that change besides those of `slices`."""
    origin: Origin | None = None
    """How to build the network before the cut; None where that was not said."""

    def __post_init__(self) -> None:
        named = ((self.layers, "layers"), (self.slices, "slices"), (self.selections, "selections"))
        for values, what in named:
            twice = [name for name, count in Counter(value.name for value in values).items() if count > 1]
            if twice:
                raise ValueError(f"{what} name '{twice[0]}' twice")
        removed = sum(layer.width - len(layer.kept) for layer in self.layers)
        if removed != self.num_removed or removed > self.num_channels:
            raise ValueError(f"the layers lose {removed} channels, num_removed says {self.num_removed}")
        if removed > self.num_asked:
            raise ValueError(f"the layers lose {removed} channels, num_asked says {self.num_asked}")
        if (self.threshold is None) != (removed == 0):
            raise ValueError(f"a threshold of {self.threshold} does not go with {removed} removed channels")
        slices = {part.name: part for part in self.slices}
        for layer in self.layers:
            part = slices.get(layer.name)
            kept = tuple(range(layer.width)) if part is None else part.outputs
            if kept != layer.kept or (part is not None and part.num_outputs != layer.width):
                raise ValueError(f"layers and slices disagree about '{layer.name}'")
        for around in self.selections:
            for side in (around.before, around.after):
                if side is not None and len(side) != len(self.kept.get(around.name, ())):
                    raise ValueError(f"layers and selections disagree about '{around.name}'")

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

    @cached_property
    def restored(self) -> int:
        """Channels that stay because widths are rounded up."""
        return sum(layer.restored for layer in self.layers)

    @property
    def short(self) -> int:
        """Channels that stay because classes of them go whole: so many fewer go than was asked."""
        return self.num_asked - self.num_removed - self.restored

    @property
    def departures(self) -> tuple[str, ...]:
        """Where the plan is not what the threshold alone would make, in a phrase each."""
        counts = {
            "stay by a floor, and others go instead": sum(self.spared.values()),
            "come back by rounding": self.restored,
            "fewer than asked, because classes of channels go whole": self.short,
        }
        return tuple(f"{count} {what}" for what, count in counts.items() if count)

    @property
    def digest(self) -> str:
        """The sha256 of the canonical JSON: equal plans have equal digests, in every process."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        content = TypeAdapter(Plan).dump_python(self, mode="json")
        assert isinstance(content, dict), "pydantic dumps dataclasses as dictionaries"
        # what plans of before did not have is left out where it is empty, so that their digests stay right
        if self.origin is None:
            del content["origin"]
        if not self.trims:
            del content["trims"]
        for name, usual in _LATER_RULES.items():
            if content["rules"][name] == usual:
                del content["rules"][name]
        for layer in content["layers"]:
            if layer["shift"] is None:
                del layer["shift"]
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
            raise ValueError(f"not a plan: {complaint(error)}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a plan: {error}") from None
        if plan.digest != digest:
            raise ValueError("the plan was changed after it was written: its digest does not match; make it again")
        return plan

    def report(self) -> str:
        """Describe the plan as a table: per layer the channels before and after, and those that only a rule keeps."""
        rows: list[tuple[str, object, object, object, object]] = [
            ("BatchNorm", "before", "after", "spared", "restored")
        ]
        rows += [(x.name, x.width, len(x.kept), x.spared or "", x.restored or "") for x in self.layers]
        width = max(len(name) for name, *_ in rows)
        lines = [f"{name:<{width}}  {a:>6} -> {b:>6}  {c:>6}  {d:>8}".rstrip() for name, a, b, c, d in rows]
        if self.selections:
            lines.append(f"{len(self.selections)} BatchNorms have a selection of channels before or after them")
        if str(self.rules):
            lines.append(f"rules: {self.rules}")
        if self.short:
            lines.append(f"{self.short} of {self.num_asked} stay because classes of channels go whole")
        limit = "none" if self.threshold is None else f"{self.threshold:.6g}"
        what = {"gamma": "|gamma|", "gamma_norm": "|gamma| x norm of its readers", "reconstruction": "share lost"}[
            self.rules.score
        ]
        what += " / layer's mean" * (self.rules.normalise == "mean")
        what = what if self.rules.scope == "network" else f"rank of {what} in its {self.rules.scope}"
        lines.append(
            f"ratio {self.ratio} of {self.rules.target}: {self.num_removed} of {self.num_channels} prunable channels "
            f"go; threshold {what} <= {limit}; "
            f"floors spare {sum(self.spared.values())}, rounding restores {self.restored}"
        )
        return "\n".join(lines)

    def __repr__(self) -> str:  # what a notebook shows: the indices would fill pages
        return self.report()


_LATER_RULES = {"normalise": "none", "scope": "network"}
"""Rules that plans of before did not have, and what they did."""


def _check_indices(name: str, kept: tuple[int, ...], width: int) -> None:
    if any(map(operator.ge, kept, kept[1:])):
        raise ValueError(f"the kept indices of '{name}' are not sorted")
    if kept[-1] >= width:
        raise ValueError(f"the kept index {kept[-1]} of '{name}' is beyond its width {width}")
