"""Small networks put together at random: whatever couples their channels, the cut equals the masked network."""

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import EXAMPLES, IMAGES, Network, exact_outputs, masked_by_hand, network, outputs, trees
from torch import Tensor

from netslim.prune import ChannelMap, Plan, cut, largest_difference, make_plan, map_channels
from netslim.prune.map import CONSTANT, Ends, Layer


@dataclass
class Choice:
    """What `make_plan` is asked for."""

    ratio: float
    coupling: str
    reduce: str
    min_channels: int
    min_share: float
    max_ratio: float
    round_to: int
    exclude: tuple[str, ...]

    def floor(self, width: int) -> int:
        most = math.floor(Fraction(str(self.max_ratio)) * width)
        return max(self.min_channels, math.ceil(Fraction(str(self.min_share)) * width), width - most)


CHOICES = st.builds(
    Choice,
    ratio=st.integers(20, 70).map(lambda percent: percent / 100),
    coupling=st.sampled_from(["group", "select"]),
    reduce=st.sampled_from(["max", "mean", "sum"]),
    min_channels=st.sampled_from([1, 1, 1, 2, 3]),
    min_share=st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.3]),
    max_ratio=st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.8]),
    round_to=st.sampled_from([1, 1, 1, 2, 3, 4]),
    exclude=st.sampled_from([(), (), (), ("body.0",)]),
)
CASES = {
    "width": st.sampled_from([8, 8, 4]),
    "seed": st.integers(0, 1000),
    "values": st.sampled_from(["random", "ties", "zeros", "signs"]),
    "form": st.sampled_from(["plain", "plain", "plain", "named", "batched", "featured"]),
    "choice": CHOICES,
}


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(parts=trees(3), **CASES)
def test_a_random_network_is_cut_exactly(parts, width, seed, values, form, choice):
    check(network(parts, width, seed, values, form), choice)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=trees(6), **CASES)
def test_many_random_networks_are_cut_exactly(parts, width, seed, values, form, choice):
    check(network(parts, width, seed, values, form), choice)


def check(model: Network, choice: Choice) -> None:
    try:
        channels = map_channels(model, EXAMPLES[model.form], choice.coupling)
    except ValueError as error:
        if "no channel of the network is prunable" in str(error):  # every class reaches something that holds it
            return
        raise
    gammas = channels.named_gammas(model, choice.coupling)
    asked, gone, stopped_by_size = chosen(channels, gammas, choice)
    if len(gone) < asked and not stopped_by_size:
        with pytest.raises(ValueError, match=f"let only {len(gone)} go"):
            make_plan(gammas, channels, **vars(choice))
        return
    plan = make_plan(gammas, channels, **vars(choice))
    assert plan.num_asked == asked
    assert_chosen(plan, gone, choice)
    small = cut(model, plan)
    assert largest_difference(model, small, plan, EXAMPLES[model.form]) < 1e-10
    twin = masked_by_hand(model, plan)
    for is_training in (False, True):
        pairs = zip(*(exact_outputs(one, is_training=is_training) for one in (small, twin)), strict=True)
        assert all(torch.allclose(have, want, rtol=0, atol=1e-10 * max(1, want.abs().max())) for have, want in pairs)
    sum(output.square().mean() for output in outputs(small.train(), IMAGES)).backward()
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())


Gamma = tuple[int, int]  # order of the layer, channel


def chosen(channels: ChannelMap, gammas: dict[str, Tensor], choice: Choice) -> tuple[int, set[Gamma], bool]:
    """Choose as the documentation says, one unit after the other and with every constraint looked up anew.

    Returns the number asked for, the gammas that go, and whether a unit stays only because it is larger than the rest.
    """
    units: dict[object, list[Gamma]] = {}
    excluded = set()
    named = [end for end in channels.modules if any(end.name.startswith(f"{name}.") for name in choice.exclude)]
    norms = {layer.name for layer in channels.layers}
    stay = {number for end in named if end.name not in norms for number in end.outputs} - {CONSTANT}
    for order, (layer, end) in enumerate(own_ends(channels)):
        for index, open_ in enumerate(layer.removable(choice.coupling)):
            key = (order, index) if choice.coupling == "select" else layer.classes[index]
            if open_:
                units.setdefault(key, []).append((order, index))
            if end in named or end.inputs[index] in stay:
                excluded.add(key)
    units = {key: unit for key, unit in units.items() if key not in excluded}
    asked = math.floor(Fraction(str(choice.ratio)) * sum(len(unit) for unit in units.values()))

    def score(unit: list[Gamma]) -> float:
        sizes = [abs(gammas[channels.layers[order].name][index].item()) for order, index in unit]
        return {"max": max, "sum": sum, "mean": lambda s: sum(s) / len(s)}[choice.reduce](sizes)

    gone: set[Gamma] = set()
    stopped_by_size = False
    for unit in sorted(units.values(), key=lambda unit: (score(unit), unit[0])):
        if len(gone) < asked and is_allowed(channels, gone.union(unit), choice):
            if len(gone) + len(unit) <= asked:
                gone.update(unit)
            else:
                stopped_by_size = True
    return asked, gone, stopped_by_size


def own_ends(channels: ChannelMap) -> list[tuple[Layer, Ends]]:
    ends = {end.name: end for end in channels.modules}
    return [(layer, ends[layer.name]) for layer in channels.layers]


def is_allowed(channels: ChannelMap, gone: set[Gamma], choice: Choice) -> bool:
    """Tell whether every BatchNorm keeps its floor, and with whole classes every other layer a channel at each end."""
    lost = Counter(order for order, _ in gone)
    if any(
        layer.width - lost[order] < choice.floor(layer.width)
        for order, layer in enumerate(channels.layers)
        if lost[order]
    ):
        return False
    if choice.coupling == "select":  # a selection stands in
        return True
    own = [end for _, end in own_ends(channels)]
    dead = {side[index] for order, index in gone for side in (own[order].inputs, own[order].outputs)}
    return all(not dead.issuperset(side) for end in channels.modules for side in (end.inputs, end.outputs))


def assert_chosen(plan: Plan, gone: set[Gamma], choice: Choice) -> None:
    removed = {(order, i) for order, x in enumerate(plan.layers) for i in set(range(x.width)) - set(x.kept)}
    assert removed <= gone
    assert choice.round_to > 1 or removed == gone
    for order, layer in enumerate(plan.layers):
        kept = len(layer.kept)
        assert kept == layer.width or (kept >= choice.floor(layer.width) and kept % choice.round_to == 0)
        if choice.coupling == "select":
            exact = layer.width - sum(place == order for place, _ in gone)
            assert kept == min(layer.width, -(-exact // choice.round_to) * choice.round_to)
