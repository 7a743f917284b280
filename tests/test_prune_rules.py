"""What is counted, how a channel is scored, which layers stay: every rule holds exactly and is said."""

import pytest
import torch
from test_prune_nets import EXAMPLE, Residual, block, chain, scramble
from torch import nn

from netslim.prune import Rules, cost, cut, map_channels, open_gammas, plan_network, slim
from netslim.prune.scores import reading_norms


def planned(model: nn.Module, ratio: float, **rules):
    channels = map_channels(model, EXAMPLE, rules.get("coupling", "group"))
    return plan_network(model, channels, EXAMPLE, ratio, Rules(**rules))


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("target", ["params", "macs"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_a_target_is_reached_with_as_few_channels_as_possible(target, ratio, coupling):
    model = scramble(Residual()).eval()
    whole = getattr(cost(model, EXAMPLE), target)
    plan = planned(model, ratio, target=target, coupling=coupling)
    left = getattr(cost(cut(model, plan), EXAMPLE), target)
    assert left <= (1 - ratio) * whole
    last = max(
        ((abs(model.get_submodule(name).weight[index].item()), name, index) for name, index in removed(plan)),
    )
    fewer = planned(model, (plan.num_removed - 1) / plan.num_channels, coupling=coupling)
    assert (last[1], last[2]) in removed(plan) - removed(fewer)
    assert getattr(cost(cut(model, fewer), EXAMPLE), target) > (1 - ratio) * whole


def removed(plan) -> set[tuple[str, int]]:
    return {(x.name, index) for x in plan.layers for index in set(range(x.width)) - set(x.kept)}


def test_a_target_is_reached_with_rounded_widths_too():
    model = scramble(chain(32, 48, 64)).eval()
    whole = cost(model, EXAMPLE).macs
    plan = planned(model, 0.5, target="macs", round_to=8)
    assert cost(cut(model, plan), EXAMPLE).macs <= 0.5 * whole
    assert all(len(layer.kept) % 8 == 0 for layer in plan.layers)


def test_a_target_that_the_rules_do_not_allow_says_how_much_goes_at_most():
    model = scramble(chain(32, 48, 64)).eval()
    with pytest.raises(ValueError, match=r"ratio 0\.9 of the macs is out of reach: .*min_share 0\.5\) let only 0\.7"):
        planned(model, 0.9, target="macs", min_share=0.5)


def test_a_ratio_of_nothing_removes_nothing():
    assert planned(scramble(Residual()).eval(), 0, target="params").num_removed == 0


def test_a_channel_read_by_larger_weights_outlives_one_of_equal_gamma():
    model = scramble(chain(8, 8)).eval()
    with torch.no_grad():
        model[0][1].weight.fill_(0.5)
        model[2][1].weight.fill_(100)
        model[6].weight.fill_(100)
        model[2][0].weight.fill_(1)
        model[2][0].weight[:, 3] = 0.1  # the next convolution hardly reads channel 3
    plan = planned(model, 1 / 40, score="gamma_norm")
    assert removed(plan) == {("0.1", 3)}
    assert planned(model, 1 / 40).kept["0.1"][0] == 1  # all alike without the norm


def test_norms_are_those_of_all_weights_that_read_a_channel():
    model = scramble(chain(6, 5)).eval()
    norms = reading_norms(model, map_channels(model, EXAMPLE))
    torch.testing.assert_close(norms["0.1"], model[2][0].weight.double().square().sum((0, 2, 3)).sqrt().detach())
    # flattened: four places of a channel are four columns of the linear layer
    columns = model[5].weight.double().square().sum(0).view(5, 4).sum(1).sqrt().detach()
    torch.testing.assert_close(norms["2.1"], columns)


def test_a_depthwise_convolution_and_a_batchnorm_hand_a_channel_on():
    deep = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    model = scramble(nn.Sequential(block(3, 8), deep, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))).eval()
    norms = reading_norms(model, map_channels(model, EXAMPLE))
    last = model[4].weight.detach().double().flatten(1).norm(dim=0)
    gains = model[2].weight.detach().double() / (model[2].running_var.double() + model[2].eps).sqrt()
    torch.testing.assert_close(norms["2"], last)
    torch.testing.assert_close(norms["0.1"], deep.weight.detach().double().flatten(1).norm(dim=1) * gains * last)


def test_norms_of_grouped_and_transposed_convolutions_go_by_channel():
    model = nn.Sequential(
        block(3, 8),
        block(8, 12, groups=4),
        block(12, 24),
        nn.ConvTranspose2d(24, 4, 3),
    )
    model = scramble(model).eval()
    norms = reading_norms(model, map_channels(model, EXAMPLE))
    weights = [m.weight.detach().double() for m in (model[1][0], model[3])]
    for channel in range(8):  # goes with those of equal place in the other groups
        torch.testing.assert_close(norms["0.1"][channel], weights[0][:, channel % 2].norm())
    torch.testing.assert_close(norms["2.1"], weights[1].flatten(1).norm(dim=1))


def test_a_whole_block_a_pattern_and_a_type_can_be_excluded():
    model = scramble(chain(8, 8, 8))
    for exclude, whole in (
        (("2",), {"2.1"}),
        (("2.1", "3*"), {"2.1", "3.1"}),
        (("Conv2d",), {"0.1", "2.1", "3.1"}),
        (("Linear",), {"7"}),
        (("BatchNorm2d",), {"0.1", "2.1", "3.1"}),
    ):
        plan = planned(model, 0.4, exclude=exclude)
        assert {layer.name for layer in plan.layers if len(layer.kept) == layer.width} == whole, exclude
        assert plan.num_channels == sum(plan.widths[name] for name in set(plan.widths) - whole)


def test_gammas_of_excluded_layers_are_not_pulled_to_zero():
    model = scramble(chain(8, 8, 8))
    channels = map_channels(model, EXAMPLE)
    found = open_gammas(model, channels, Rules(exclude=("2",)))
    assert {id(gamma) for gamma in found} == {id(model.get_submodule(name).weight) for name in ("0.1", "3.1", "7")}


def test_an_excluded_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"exclude names 'layer9\.\*', but no layer"):
        planned(scramble(Residual()), 0.4, exclude=("stem", "layer9.*"))


def test_the_report_lists_the_rules_and_what_they_kept():
    model = scramble(chain(20, 30))
    report = planned(model, 0.5, min_share=0.3, round_to=8, exclude=("Linear",)).report()
    assert "rules: min_share 0.3, round_to 8, exclude Linear" in report
    assert "rounding restores" in report


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="min_chanels"):
        slim(chain(4, 4), EXAMPLE, ratio=0.5, min_chanels=2)


@pytest.mark.parametrize("coupling", ["group", "select"])
def test_with_a_threshold_for_each_layer_all_lose_the_same_share(coupling):
    model = scramble(chain(8, 16, 32))
    with torch.no_grad():
        model[0][1].weight.mul_(0.01)  # one threshold for the network would take all of it that it may
    plan = planned(model, 0.5, scope="layer", coupling=coupling)
    assert [2 * len(layer.kept) for layer in plan.layers] == [layer.width for layer in plan.layers]
    gone = [index for name, index in removed(plan) if name == "0.1"]
    assert sorted(gone) == sorted(model[0][1].weight.argsort()[:4].tolist())
    assert "threshold rank of |gamma| in its layer <= 0.5" in plan.report()


def test_with_a_threshold_for_each_family_like_layers_compete_and_others_do_not():
    model = scramble(
        nn.Sequential(block(3, 8), block(8, 8), block(8, 8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), head(8))
    )
    with torch.no_grad():
        model[0][1].weight.mul_(0.01)
        model[4].weight.mul_(100)  # alone of its kind: a linear layer reads it
    plan = planned(model, 0.5, scope="family")
    kept = {name: len(indices) for name, indices in plan.kept.items()}
    assert kept["4"] == 4
    assert kept["0.1"] < 4
    assert kept["0.1"] + kept["1.1"] + kept["2.1"] == 12


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def test_normalised_scores_compare_layers_of_different_scales():
    model = scramble(chain(8, 16))
    plain = planned(model, 0.5, normalise="mean")
    with torch.no_grad():
        model[0][1].weight.mul_(0.01)
    assert planned(model, 0.5, normalise="mean").kept == plain.kept
    assert planned(model, 0.5).kept != plain.kept


def test_plans_of_before_there_were_scopes_keep_their_digests():
    plan = planned(scramble(chain(8)), 0.5)
    assert "scope" not in plan.to_json()
    assert "normalise" not in plan.to_json()
    scoped = planned(scramble(chain(8)), 0.5, scope="layer")
    assert type(scoped).from_json(scoped.to_json()) == scoped
