"""Classes of channels go whole, and every constraint holds."""

import pytest
import torch
from test_prune_nets import EXAMPLE, Residual, block, scramble
from torch import Tensor, nn

from netslim.prune import cut, largest_difference, make_plan, map_channels


class Grouped(nn.Module):
    """A grouped convolution in the middle: of eight channels in four groups, two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.head = block(3, 8), block(8, 12, groups=4), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.first(x)).mean((2, 3)))


def planned(model: nn.Module, **options):
    channels = map_channels(model, EXAMPLE)
    return make_plan(channels.named_gammas(model), channels, **options)


def residual(stem: Tensor, outer: Tensor) -> nn.Module:
    """The residual network whose stem and branch have these gammas; those inside the block are large."""
    model = scramble(Residual())
    with torch.no_grad():
        model.stem[1].weight.copy_(stem)
        model.outer[1].weight.copy_(outer)
        model.inner[1].weight.fill_(100)
    return model


UP, DOWN = torch.arange(8) + 1.0, torch.tensor([20.0, 7, 6, 5.5, 4, 3, 1, 2])


@pytest.mark.parametrize(("reduce", "first"), [("max", 4), ("sum", 6), ("mean", 6)])
def test_a_class_is_ranked_by_the_reduction_that_is_asked(reduce, first):
    plan = planned(residual(UP, DOWN), ratio=0.072, reduce=reduce)
    gone = set(range(8)) - set(plan.kept["stem.1"])
    assert gone == {first}
    assert plan.kept["stem.1"] == plan.kept["outer.1"]


def test_a_class_that_would_exceed_the_number_is_passed_over():
    model = residual(UP, DOWN)
    plan = planned(model, ratio=0.11)
    assert (plan.num_asked, plan.num_removed) == (3, 3)  # a pair, then one gamma of the block
    assert len(plan.kept["inner.1"]) == 11


def test_a_ratio_between_classes_is_reached_as_far_as_whole_classes_go():
    model = scramble(Grouped())
    plan = planned(model, ratio=0.5)  # 4 + 4 gammas in the first layer, 4 + 4 + 4 in the second
    assert (plan.num_asked, plan.num_removed) == (10, 8)
    assert "2 of 10 stay because classes of channels go whole" in plan.report()
    assert plan.departures == ("2 fewer than asked, because classes of channels go whole",)


def test_groups_stay_and_stay_equal():
    model = scramble(Grouped()).eval()
    plan = planned(model, ratio=0.5)
    small = cut(model, plan)
    conv = small.mid[0]
    assert conv.groups == 4
    assert conv.weight.shape[1] == conv.in_channels // 4
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-10


def test_unequal_groups_are_refused_before_anything_is_cut():
    plain = nn.Sequential(block(3, 8), block(8, 8), nn.Conv2d(8, 2, 1))
    grouped = nn.Sequential(block(3, 8), block(8, 8, groups=2), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match=r"unequal groups in '1.0'"):
        cut(grouped, planned(scramble(plain), ratio=0.4))


def test_widths_are_rounded_up_keeping_the_largest():
    model = scramble(nn.Sequential(block(3, 20), block(20, 30), nn.Conv2d(30, 2, 1)))
    plan, rounded = planned(model, ratio=0.5), planned(model, ratio=0.5, round_to=8)
    for layer in rounded.layers:
        exact = len(plan.kept[layer.name])
        assert len(layer.kept) == min(layer.width, -(-exact // 8) * 8)
        gamma = model.get_submodule(layer.name).weight.abs()
        assert set(layer.kept) == set(gamma.topk(len(layer.kept)).indices.tolist())
    assert rounded.num_removed < rounded.num_asked


def test_rounding_holds_in_every_layer_of_a_class():
    plan = planned(scramble(Residual()), ratio=0.5, round_to=4)
    assert all(len(layer.kept) % 4 == 0 for layer in plan.layers)


def test_no_layer_loses_more_than_its_largest_share():
    model = residual(torch.full((8,), 0.1), torch.full((8,), 0.1))
    plan = planned(model, ratio=0.5, max_ratio=0.6)
    assert all(len(layer.kept) >= 0.4 * layer.width for layer in plan.layers)
    assert plan.num_removed == 14


def test_an_excluded_layer_loses_nothing_and_does_not_count():
    plan = planned(scramble(Residual()), ratio=0.5, exclude=["stem.*"])
    assert plan.num_channels == 12  # with the stem's, the branch's gammas of the same classes
    assert [len(layer.kept) for layer in plan.layers] == [8, 6, 8]


def test_floors_that_hold_classes_make_the_ratio_unreachable():
    with pytest.raises(ValueError, match=r"let only 14 go, 7 fewer; the largest ratio possible is 0\.5"):
        planned(scramble(Residual()), ratio=0.75, min_share=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ratio": 1.5}, "max_ratio is 1.5: input should be less than or equal to 1"),
        ({"round_to": 0}, "round_to is 0: input should be greater than or equal to 1"),
    ],
)
def test_constraints_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        planned(scramble(Residual()), ratio=0.5, **options)
