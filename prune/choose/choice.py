"""The choice: which gammas go, under one threshold for the whole network and every constraint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from netslim.prune.choose.plan import Kept, Plan
from netslim.prune.choose.rules import Rules, check_ratio, exact
from netslim.prune.choose.slices import Flags, realise
from netslim.prune.choose.units import Rooms, Units, by_layer, units_of
from netslim.prune.map import ChannelMap

ShareGone = Callable[[Plan], float]
"""Tells what share of its target a plan takes away, in [0, 1]."""


def make_plan(gammas: Mapping[str, Tensor], channels: ChannelMap, *, ratio: float, **rules: Any) -> Plan:
    """Choose the channels of smallest |gamma| over the whole network (Liu et al. 2017, section 3, arXiv 1708.06519).

    floor(ratio * N) of the N removable gammas are to go: the smallest, ties by order of layers, then by channel. With
    coupling "select" every gamma counts by itself. With "group" classes are taken whole, in the order of the `reduce`
    of their |gamma|; one that would exceed the number is passed over for the next that fits, so fewer may go, by less
    than the size of the smallest class left. Every layer keeps max(min_channels, ceil(min_share * width), width -
    floor(max_ratio * width)) channels or all it has; where that holds a channel, the next smallest goes instead. Ratios
    are exact decimals: 0.29 of 100 is 29.

    Args:
        gammas: per BatchNorm with removable gammas (`channels.named_gammas(model, coupling)`), (width,), any device.
        rules: the fields of `Rules`; not those that ask for the network itself (`target`, `score`: see `plan_network`).

    Raises: ValueError if a number is out of its range, gammas are missing, misshapen or not finite, or if the rules
    make the ratio unreachable.
    """
    return choose(gammas, channels, ratio, Rules(**rules))


def choose(
    scores: Mapping[str, Tensor], channels: ChannelMap, ratio: float, rules: Rules, share_gone: ShareGone | None = None
) -> Plan:
    """Choose by scores as `make_plan` does by |gamma|; with `share_gone`, until the share that it tells is reached."""
    check_ratio(ratio)
    if (rules.target == "channels") != (share_gone is None):
        raise ValueError(f"target {rules.target} is counted in the network itself: use plan_network or slim")
    choice = _Choice(units_of(scores, channels, rules), channels, ratio, rules)
    return choice.by_count() if share_gone is None else choice.by_share(share_gone)


def choose_zeros(
    scores: Mapping[str, Tensor], channels: ChannelMap, rules: Rules, limit: float = 0.0, most: float = 1.0
) -> Plan:
    """Choose every channel whose score is at most the limit, but for those that the rules hold.

    Scores as in `choose`. At most a share of ``most`` of all channels goes, those of smallest score. The plan's ratio
    is the share that goes.
    """
    rules = replace(rules, scope="network", normalise="none")  # the limit is one of the scores themselves
    return _Choice(units_of(scores, channels, rules), channels, 0.0, rules).by_limit(limit, most)


class _Choice:
    """One choice under way: the units, the room that the rules leave, and the ratio."""

    def __init__(self, units: Units, channels: ChannelMap, ratio: float, rules: Rules) -> None:
        self.units, self.channels, self.ratio, self.rules = units, channels, ratio, rules
        floors = np.array([_floor(layer.width, rules) for layer in channels.layers])
        self.rooms = Rooms(channels, units, floors, rules.coupling)
        self.count = units.count

    @property
    def _rules(self) -> str:
        """The rules in words, also where none were given."""
        return str(self.rules) or "one channel in every layer"

    def by_count(self) -> Plan:
        """Take floor(ratio * count) gammas."""
        asked = self.units.asked(self.ratio)
        taken, refused = self._take(asked)
        removed = int(self.units.sizes[taken].sum())
        if removed < asked and not self._stopped_by_size(taken, asked - removed):
            raise ValueError(
                f"ratio {self.ratio} asks for {asked} of {self.count} channels, but the rules "
                f"({self._rules}) let only {removed} go, {asked - removed} fewer; "
                f"the largest ratio possible is {removed / self.count:.6g}"
            )
        return self._plan(taken, refused, asked)

    def by_share(self, share_gone: ShareGone) -> Plan:
        """Take gammas in their order, as few as bring the target's share to the ratio."""
        taken, refused = self._take_carefully(self.count)
        rank = self.units.rank
        sequence = np.flatnonzero(taken)
        sequence = sequence[rank[sequence].argsort()]

        def plan_of(count: int) -> Plan:
            some = np.zeros_like(taken)
            some[sequence[:count]] = True
            last = rank[sequence[count - 1]] if count else -1
            return self._plan(some, refused & (rank < last), int(self.units.sizes[some].sum()))

        low, high = 0, len(sequence)
        most = share_gone(plan_of(high))
        if most < self.ratio:
            raise ValueError(
                f"ratio {self.ratio} of the {self.rules.target} is out of reach: the rules ({self._rules}) "
                f"let only {most:.6g} go, {self.ratio - most:.2g} less"
            )
        while low < high:
            middle = (low + high) // 2
            if share_gone(plan_of(middle)) < self.ratio:
                low = middle + 1
            else:
                high = middle
        return plan_of(high)

    def by_limit(self, limit: float, most: float) -> Plan:
        """Take the units whose score is at most the limit, in their order until a share of ``most`` is gone."""
        low = self.units.scores <= limit
        asked = min(int(self.units.sizes[low].sum()), math.floor(exact(most) * self.count))
        taken, refused = self._take_carefully(asked)  # in their order, and others where the rules hold one of them
        plan = self._plan(taken & low, refused & low, asked)
        return replace(plan, ratio=plan.num_removed / max(1, plan.num_channels))

    def _take(self, asked: int) -> tuple[Flags, Flags]:
        """Take units in order while they fit: flags (units,) of those taken, and of those that only a rule spares."""
        taken = self.units.smallest(asked)
        if (self.rooms.left(taken) >= 0).all():
            return taken, np.zeros_like(taken)
        return self._take_carefully(asked)

    def _take_carefully(self, asked: int) -> tuple[Flags, Flags]:
        sizes, needs = self.units.sizes.tolist(), self.rooms.needs
        taken, refused, left = np.zeros(len(sizes), bool), np.zeros(len(sizes), bool), asked
        room = self.rooms.left(taken).tolist()
        for unit in self.units.order.tolist():
            if left <= 0:
                break
            if any(room[key] < need for key, need in needs[unit].items()):
                refused[unit] = True
            elif sizes[unit] <= left:
                taken[unit] = True
                left -= sizes[unit]
                for key, need in needs[unit].items():
                    room[key] -= need
        return taken, refused

    def _stopped_by_size(self, taken: Flags, short: int) -> bool:
        """Tell whether a class stays only because it is larger than what was still to go."""
        room = self.rooms.left(taken).tolist()
        return any(
            self.units.sizes[unit] > short and all(room[key] >= need for key, need in self.rooms.needs[unit].items())
            for unit in np.flatnonzero(~taken).tolist()
        )

    def _rounded_up(self, taken: Flags) -> Flags:
        """Give units back, the largest first, until every cut layer has a multiple of channels, or all it had."""
        units, taken = self.units, taken.copy()
        widths = np.array([layer.width for layer in self.channels.layers])
        mine = np.flatnonzero(units.owners >= 0)
        while True:
            gone = mine[taken[units.owners[mine]]]
            lost = np.bincount(units.layers[gone], minlength=len(widths))
            odd = np.flatnonzero((lost > 0) & ((widths - lost) % self.rules.round_to > 0))
            if not len(odd):
                return taken
            there = units.owners[gone[units.layers[gone] == odd[0]]]
            taken[there[units.rank[there].argmax()]] = False

    def _plan(self, taken: Flags, refused: Flags, num_asked: int) -> Plan:
        rounded = self._rounded_up(taken) if self.rules.round_to > 1 else taken
        gone, spared, restored = (self._by_layer(units) for units in (rounded, refused, taken & ~rounded))
        slices, selections, trims = realise(self.channels, gone)
        return Plan(
            ratio=float(self.ratio),
            rules=self.rules,
            threshold=float(self.units.scores[rounded].max()) if rounded.any() else None,
            num_channels=self.count,
            num_asked=num_asked,
            num_removed=int(self.units.sizes[rounded].sum()),
            layers=tuple(
                Kept(
                    name=layer.name,
                    width=layer.width,
                    kept=tuple(np.flatnonzero(~gone[layer.name]).tolist()),
                    spared=int(spared[layer.name].sum()),
                    restored=int(restored[layer.name].sum()),
                    shift=layer.shift,
                )
                for layer in self.channels.layers
            ),
            slices=slices,
            selections=selections,
            trims=trims,
        )

    def _by_layer(self, units: Flags) -> dict[str, Flags]:
        """Flag the gammas of some units, per BatchNorm (width,)."""
        owners = self.units.owners
        flags = (owners >= 0) & units[owners] if len(units) else np.zeros(len(owners), bool)
        return by_layer(flags, self.channels)


def _floor(width: int, rules: Rules) -> int:
    most = math.floor(exact(rules.max_ratio) * width)
    return max(rules.min_channels, math.ceil(exact(rules.min_share) * width), width - most)
