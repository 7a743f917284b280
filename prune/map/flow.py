"""A network that runs with a label on every value tells which values belong to which channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netslim.prune.map import dimensions as dims
from netslim.prune.map import operations as ops
from netslim.prune.map.binding import LAYERS, Binding
from netslim.prune.map.classes import UNNORMALISED, Classes, along, varying
from netslim.prune.map.counts import Count
from netslim.prune.map.layers import Bond, see_selectable
from netslim.prune.map.moves import Moves
from netslim.prune.map.operations import Labelled, Step
from netslim.prune.map.values import elementwise, is_constant, no_channels
from netslim.prune.record import Call, Record, Recorder, is_inplace, line_of_user, mapped, parts_of, tensors_of

Found = tuple[Sequence[Tensor] | None, str | None]
"""The labels of all results, and why what went in has to stay, as in `Labelled`."""


class Flow:
    """Labels on their way through a network that runs.

    Every value carries an int64 tensor of its own shape. It is *tight*: expanded (stride 0) along each dimension in
    which the labels do not vary, so labels of large images cost no memory and the varying dimensions can be read off.
    """

    def __init__(self, model: nn.Module, *, hashes: bool = False) -> None:
        self.classes = Classes()
        self.layers = Binding(model, self.classes)
        self.notes: list[str] = []
        """What was not looked at, in one line each."""
        self._moves = Moves(self.classes, hashes=hashes)
        self._labels: dict[int, Tensor] = {}
        self._loose: dict[int, tuple[str, torch.Size]] = {}
        self._tainted: set[int] = set()
        """Values that depend on the network's input."""
        self._decisions: dict[str, str] = {}
        """Module whose forward reads such values -> where."""

    def enters(self, number: int, value: Tensor, kind: str, name: str) -> None:
        """Label a value that no call made."""
        if kind == "input":
            labels = self._labels[number] = self._channels_of(value)
            self.classes.freeze(labels, "network input")
            self._tainted.add(number)
        elif name:
            self._loose[number] = name, value.shape  # labelled where it is read outside a layer
        else:
            self._labels[number] = no_channels(value.shape)

    def sizes(self, number: int) -> tuple[int, ...] | None:
        """Count the channels among the sizes of a value; None where there are none."""
        labels = self._labels.get(number)
        if labels is None or not varying(labels) or self.classes.is_free(labels):
            return None
        return self._moves.sizes(labels)

    def leaves(self, record: Record) -> None:
        """Keep what the network returns, and what is about a decision that it makes by values; the run is over."""
        for number in record.results:
            self.classes.freeze(self._of(number), "network output")
        for home, why in _passed_on(self._decisions, record).items():
            own = record.passages.get(home, ())
            inside = (each for calls in record.passages.values() for each in calls if each.home == home)
            calls = (call for call in record.calls if call.home == home)
            for each in (*own, *inside, *calls):
                for number in (*each.inputs, *each.outputs):
                    self.classes.freeze(self._of(number), why)
        self._moves.settle([(use.inputs, use.outputs) for use in self.layers.uses.values() if use.normalises])
        see_selectable(self.layers.uses.values(), self.classes, record, self._labels)
        self._labels, self._loose, self._tainted, self._decisions = {}, {}, set(), {}

    def follows(
        self,
        call: Call,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        made: Sequence[Tensor],
        recorder: Recorder,
    ) -> None:
        """Label what a call made; what is called with arguments that no rule foresees, stays."""
        if not self._tainted.isdisjoint(call.inputs):
            self._tainted.update(call.outputs)
            if not made:
                self._decisions.setdefault(call.home, f"{self._place(call)} decides by values")
        if call.name in ops.KEEPING and len(call.inputs) == len(made) == 1 and call.inputs[0] in self._labels:
            self._labels[call.outputs[0]] = self._labels[call.inputs[0]]
            return
        look = self._bound if call.name in LAYERS else self._ruled
        try:
            found, why = look(call, function, args, kwargs, made)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            found, why = None, f"'{call.name}' with these arguments at {self._place(call)}"
        if why is not None:
            self._hold(call, (args, kwargs), why)
        found = self._mixed(call, made, why or "") if found is None else found
        if is_inplace(function) and found and call.inputs:
            self._written(call, recorder, args[0], found[0])
        self._labels |= dict(zip(call.outputs, found, strict=True))

    def _bound(self, call: Call, function: object, args: Any, kwargs: Any, made: Sequence[Tensor]) -> Found:
        """Label what a layer with weights makes."""
        numbers = {id(x): number for x, number in zip(tensors_of((args, kwargs)), call.inputs, strict=True)}
        given = dict(zip(LAYERS[call.name], args, strict=False)) | kwargs
        tensors = {key: numbers[id(x)] for key, x in given.items() if isinstance(x, Tensor)}
        own = {key: self._loose[number][0] if number in self._loose else "" for key, number in tensors.items()}
        labels = {key: self._of(n) for key, n in tensors.items() if key == "input" or not own[key]}
        bond = Bond(call, given, own, labels, made[0].shape, lambda: self._place(call))
        found, why = self.layers.bind(bond)
        return None if found is None else [found], why

    def _ruled(self, call: Call, function: Callable[..., Any], args: Any, kwargs: Any, made: Sequence[Tensor]) -> Found:
        """Label what a function without weights makes, by its rule."""
        order = iter(call.inputs)

        def labelled(value: Any) -> Any:
            return self._of(next(order)) if isinstance(value, Tensor) else value

        step = Step(
            call.name,
            function,
            mapped(args, labelled),
            mapped(kwargs, labelled),
            [value.dtype for value in tensors_of((args, kwargs))],
            [value.shape for value in made],
            self._place(call),
            call.home,
        )
        found, why = self._rule(step)
        if found is not None and len(found) != len(made):
            found, why = None, f"'{call.name}' with these arguments"
        return found, why if why is None or step.place in why else f"{why} at {step.place}"

    def _rule(self, step: Step) -> Found:
        """Label what a function without weights makes, or say why its channels cannot be followed."""
        name, operands = step.name, step.operands
        if name in ops.FACTORIES or name in ops.SAMPLING:
            return self._moves.anew(step)
        if not step.shapes:
            for read in operands:
                self.classes.freeze(read, f"values read by '{name}' at {step.place}")
            return [], None
        if all(map(is_constant, operands)) and not parts_of((step.args, step.kwargs), Count):
            return [no_channels(shape) for shape in step.shapes], None
        if name in ops.MOVING:
            return self._moves.follow(step)
        if name == "instance_norm":
            self.layers.tell(step.home, operands[0])
        rule = _RULES.get(name)
        if name in ("max", "min") and len(parts_of(step.args, Tensor)) == 1:
            rule = dims.reduced
        labels, why = rule(self.classes, step) if rule is not None else (None, _unknown(name))
        return None if labels is None else [labels] * len(step.shapes), why

    def _written(self, call: Call, recorder: Recorder, value: Tensor, labels: Tensor) -> None:
        """Keep the channels of tensors that are written into through another one, unless nothing came of it."""
        if labels is self._of(call.inputs[0]):
            return
        for number in recorder.shares_memory(value, call.outputs[0]):
            if number in self._labels:
                for each in (self._labels[number], labels):
                    if not is_constant(each):
                        self.classes.freeze(
                            each, f"'{call.name}' writes into a part of another tensor at {self._place(call)}"
                        )

    def _of(self, number: int) -> Tensor:
        """Look up the labels of a value; an element of a parameter that is read outside a layer gets one of its own."""
        labels = self._labels.get(number)
        return self.layers.elements(*self._loose[number]) if labels is None else labels

    def _hold(self, call: Call, value: Any, why: str) -> None:
        """Keep the channels of all that goes into a call, and the parameters among it."""
        for number in call.inputs:
            if number in self._loose:
                self.layers.held.setdefault(self._loose[number][0], why)
            else:
                self.classes.freeze(self._of(number), why)
        for count in parts_of(value, Count):
            self.classes.freeze(count.labels, why)

    def _mixed(self, call: Call, made: Sequence[Tensor], why: str) -> list[Tensor]:
        """Label what comes out of a call that no channel can be followed through."""
        joint = self.classes.fresh(1, UNNORMALISED)
        self.classes.freeze(joint, why)
        return [joint[0].expand(value.shape) for value in made]

    def _channels_of(self, value: Tensor) -> Tensor:
        """Make labels for the channels of a value (n, channels, ...)."""
        if value.dim() < 2:
            return self.classes.fresh(1, UNNORMALISED)[0].expand(value.shape)
        return along(self.classes.fresh(value.shape[1], UNNORMALISED), 1, value.shape)

    def _place(self, call: Call) -> str:
        where = line_of_user()
        if not call.home:
            return where or "its forward"
        return f"'{call.home}' ({where})" if where else f"'{call.home}'"


def _passed_on(decisions: Mapping[str, str], record: Record) -> dict[str, str]:
    """Add the modules that are told of a decision: their forward calls one that returns more than tensors."""
    found, rest = dict(decisions), list(decisions)
    while rest:
        home = rest.pop()
        for passage in record.passages.get(home, ()):
            if passage.tells and passage.home not in found:
                found[passage.home] = found[home]
                rest.append(passage.home)
    return found


def _copied(classes: Classes, step: Step) -> Labelled:
    """Take the labels of what is written over a value."""
    return step.operands[1].expand(step.shape), None


def _first(classes: Classes, step: Step) -> Labelled:
    """Take labels through a change of type or place, for which another value may be the model."""
    return step.operands[0], None


def _unknown(name: str) -> str:
    return f"operation '{name}' is not known to keep channels apart"


_RULES: dict[str, Callable[[Classes, Step], Labelled]] = dict.fromkeys(ops.ELEMENTWISE, elementwise)
_RULES |= dict.fromkeys((*ops.LOCAL, "interpolate"), dims.pooled)
_RULES |= dict.fromkeys(ops.REDUCING - ops.ELEMENTWISE, dims.reduced)
_RULES |= dict.fromkeys(("softmax", "log_softmax", "softmin"), dims.softened)
_RULES |= dict.fromkeys(("grid_sample", "grid_sampler", "roi_align", "roi_pool"), dims.sampled)
_RULES |= dict.fromkeys(("to", "type_as"), _first) | {"copy": _copied}
_RULES |= {
    "setitem": dims.put,
    "pad": dims.padded,
    "unfold": dims.unfolded,
    "pixel_shuffle": dims.shuffled,
    "pixel_unshuffle": dims.shuffled,
    "glu": dims.gated,
    "cumsum": dims.summed_up,
    "normalize": dims.normalised,
    "instance_norm": dims.instance_normalised,
    "matmul": dims.matrix_product,
    "einsum": dims.contracted,
    "scaled_dot_product_attention": dims.attention,
}
