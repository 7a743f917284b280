"""Slimming in one call, and the plan for it: the one place where map, scores, choice, cut and proof meet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from netslim.prune.choose import Plan, Rules, ShareGone, choose, realise, restricted, units_of
from netslim.prune.cut import cut, proof_of, prove, scales_of
from netslim.prune.map import ChannelMap, Coupling, few, map_channels
from netslim.prune.record import Example, tensor_of, weight_of
from netslim.prune.repair import Calibration
from netslim.prune.scores import score_channels
from netslim.prune.ship import cost

FEW = 0.1
"""Share of the channels, or of the parameters, below which a warning says that hardly anything can go."""


def slim(
    model: nn.Module, example: Example, *, ratio: float, calibration: Calibration | None = None, **rules: Any
) -> tuple[nn.Module, Plan]:
    """Map, plan, cut and prove in one call: the smaller network and its plan; the model is unchanged.

    Args: example, as the network is called: images (n, 3, height, width), or a tuple, list or dictionary of arguments,
    on the model's device; ratio in [0, 1); calibration, for the score that measures on images; rules: the fields of
    `Rules`.
    Raises: ValueError as `map_channels` and `plan_network` do; RuntimeError as `cut_proved` does.
    """
    chosen = Rules(**rules)
    channels = map_channels(model, example, chosen.coupling)
    for line in cautions(model, channels, chosen.coupling):
        warnings.warn(line, stacklevel=2)
    scores = score_channels(model, channels, chosen, calibration)
    made = cut_proved(model, channels, example, ratio, chosen, scores)
    for line in made.notes:
        warnings.warn(line, stacklevel=2)
    return made.small, made.plan


@dataclass(frozen=True)
class Proved:
    """A cut that was proved."""

    small: nn.Module
    plan: Plan
    difference: float
    """From the masked network, as `largest_difference` measures it."""
    is_double: bool
    """Whether it was measured in float64; else in the precision of the network, which does not run in that."""
    notes: tuple[str, ...]
    """What had to stay all the same, in one line each."""


def cut_proved(
    model: nn.Module,
    channels: ChannelMap,
    example: Example,
    ratio: float,
    rules: Rules,
    scores: Mapping[str, Tensor] | None = None,
) -> Proved:
    """Plan as `plan_network` does, cut and prove; where the proof fails, keep those channels and plan again.

    So it is where a network's code counts on a width in a way that no map shows. Then each layer's channels are cut by
    themselves, to find those that it fails for.

    Raises: ValueError as `plan_network` and `prove` do; RuntimeError if no layer by itself fails the proof, or all do.
    """
    notes: list[str] = []
    while True:
        plan = plan_network(model, channels, example, ratio, rules, scores)
        small = cut(model, plan)
        try:
            return Proved(small, plan, *proof_of(model, small, plan, example), tuple(notes))
        except RuntimeError:
            for classes, why in (unsound := _unsound(model, channels, plan, example)):
                channels = channels.holding(classes, why)
                notes.append(f"{len(classes)} channels stay: {why}")
            if not unsound or not any(size for size, _ in channels.sizes(rules.coupling)):
                raise


def _unsound(model: nn.Module, channels: ChannelMap, plan: Plan, example: Example) -> list[tuple[frozenset[int], str]]:
    """Find the classes of a plan that cannot be cut by themselves, those that the same layers share together."""
    found = []
    alone = plan.rules.coupling == "select"
    for names, classes in channels.together(alone=alone).items():
        some = restricted(plan, channels, names)
        if not some.num_removed:
            continue
        try:
            prove(model, cut(model, some), some, example)
        except RuntimeError as error:
            found.append((classes, f"without channels of {few([repr(name) for name in names])} {error}"))
    return found


def cautions(model: nn.Module, channels: ChannelMap, coupling: Coupling = "group") -> list[str]:
    """Say what a user should know before a week of training, in one line each: what the map leaves whole, and why.

    Args: channels, the map of the model.
    """
    lines = list(channels.notes)
    reach = _reach(model, channels, coupling)
    removable, width = (sum(sizes) for sizes in zip(*channels.sizes(coupling), strict=True))
    if min(reach, removable / width) < FEW:
        lines.append(
            f"little of this network can go: {removable / width:.1%} of its {width} channels, with them at most "
            f"{reach:.1%} of the parameters; {channels.kept_by(coupling)}"
        )
    return lines


def _reach(model: nn.Module, channels: ChannelMap, coupling: Coupling) -> float:
    """The share of the parameters that goes if all channels go that can, but for one in every layer."""
    gone = {layer.name: np.asarray(layer.removable(coupling)) for layer in channels.layers}
    for flags in gone.values():
        flags[:1] = False
    slices, _, trims = realise(channels, gone)
    lost = 0
    for part in slices:
        weight = weight_of(model, part.name)
        kept_inputs = part.num_inputs if part.inputs is None else len(part.inputs)
        kept_outputs = part.num_outputs if part.outputs is None else len(part.outputs)
        if weight is not None:
            is_single = weight.dim() == 1 or weight.shape[1] == 1 < part.num_inputs  # BatchNorm, depthwise
            inputs = 1.0 if is_single else kept_inputs / part.num_inputs
            lost += round(weight.numel() * (1 - inputs * kept_outputs / part.num_outputs)) * (1 + (weight.dim() == 1))
    for trim in trims:
        tensor = tensor_of(model, trim.name)
        if isinstance(tensor, nn.Parameter):
            lost += round(tensor.numel() * (1 - len(trim.kept) / trim.size))
    return lost / max(1, sum(parameter.numel() for parameter in model.parameters()))


def plan_network(
    model: nn.Module,
    channels: ChannelMap,
    example: Example,
    ratio: float,
    rules: Rules,
    scores: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Choose what goes of a network, under any rules.

    The target "channels" is met as in `make_plan`. For "params" and "macs" channels go in the same order, as few of
    them as bring the network's parameters, or its multiply-accumulates on the example, to (1 - ratio) or less.

    Args: channels, the map of the model; example, as for `slim`; ratio in [0, 1); scores, if they
    are known: those of `score_channels`.
    Raises: ValueError as `make_plan` does, also if the target cannot be reached.
    """
    scores = score_channels(model, channels, rules) if scores is None else scores
    return choose(scores, channels, ratio, rules, _share_gone(model, example, rules))


def open_gammas(
    model: nn.Module, channels: ChannelMap, rules: Rules, small: nn.Module | None = None
) -> list[nn.Parameter]:
    """List the gammas that sparsity training should pull to zero: of BatchNorms that may lose one under the rules.

    Those of `small`, if it is given: what a cut of the model left.
    """
    gammas = channels.named_gammas(model, rules.coupling)
    units = units_of(gammas, channels, rules)
    layers = (channels.layers[layer] for layer in sorted(set(units.layers[units.owners >= 0].tolist())))
    return [scales_of(model if small is None else small, layer)[0] for layer in layers]


def _share_gone(model: nn.Module, example: Example, rules: Rules) -> ShareGone | None:
    if rules.target == "channels":
        return None

    def price(network: nn.Module) -> int:
        bill = cost(network, example)
        return bill.params if rules.target == "params" else bill.macs

    whole = price(model)
    return lambda plan: 1 - price(cut(model, plan)) / whole
