"""The plan removes exactly the channels that it should, and refuses everything that is no plan."""

import json
import math
import subprocess
import sys

import pytest
import torch
from test_prune_nets import EXAMPLE, Catenated, block, chain, scramble
from torch import nn

from netslim.prune import Plan, make_plan, map_channels

TWO = nn.Sequential(*chain(40, 60)[:5], nn.Linear(240, 10))  # BatchNorms '0.1' of 40 and '2.1' of 60
MAP = map_channels(TWO, EXAMPLE)


def plan_of(first, second, **options) -> Plan:
    gammas = {"0.1": torch.as_tensor(first).float(), "2.1": torch.as_tensor(second).float()}
    return make_plan(gammas, MAP, **options)


def random_gammas(seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    return values[:40], values[40:]


@pytest.mark.parametrize(("ratio", "num_removed"), [(0, 0), (0.29, 29), (0.57, 57), (0.005, 0), (0.98, 98)])
def test_the_ratio_is_an_exact_decimal(ratio, num_removed):
    assert plan_of(*random_gammas(), ratio=ratio).num_removed == num_removed


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_removed_set_is_the_exact_smallest_set(ratio):
    gammas = torch.cat(random_gammas())
    plan = plan_of(*random_gammas(), ratio=ratio)
    kept = {*plan.kept["0.1"], *(40 + index for index in plan.kept["2.1"])}
    assert kept == set(gammas.abs().argsort()[round(ratio * 100) :].tolist())


def test_the_threshold_is_the_largest_removed_gamma():
    plan = plan_of(torch.arange(40) + 1, torch.arange(60) + 101, ratio=0.1)
    assert plan.threshold == 10.0


def test_a_negative_gamma_counts_by_its_size():
    plan = plan_of([-3.0] * 20 + [1.0] * 20, [2.0] * 60, ratio=0.2)
    assert plan.kept["0.1"] == tuple(range(20))


def test_ties_go_by_layer_and_then_by_channel():
    plan = plan_of(torch.ones(40), torch.ones(60), ratio=0.3)
    assert plan.kept["0.1"] == tuple(range(30, 40))
    assert len(plan.kept["2.1"]) == 60


def test_no_layer_is_emptied_and_the_next_smallest_goes_instead():
    plan = plan_of(torch.full((40,), 0.1), torch.arange(60) + 1, ratio=0.4)
    assert plan.kept == {"0.1": (39,), "2.1": tuple(range(1, 60))}
    assert plan.spared == {"0.1": 1}


def test_a_floor_as_a_count_spares_channels_and_counts_them():
    plan = plan_of(torch.full((40,), 0.1), torch.arange(60) + 1, ratio=0.4, min_channels=15)
    assert [len(kept) for kept in plan.kept.values()] == [15, 45]
    assert plan.spared == {"0.1": 15}


def test_a_floor_as_a_share_is_rounded_up_exactly():
    plan = plan_of(torch.full((40,), 0.1), torch.arange(60) + 1, ratio=0.4, min_share=0.29)
    assert len(plan.kept["0.1"]) == math.ceil(11.6)


def test_a_layer_narrower_than_the_floor_stays_whole():
    plan = plan_of(torch.full((40,), 0.1), torch.arange(60) + 1, ratio=0.1, min_channels=50)
    assert [len(kept) for kept in plan.kept.values()] == [40, 50]


def test_an_unreachable_ratio_says_the_largest_possible():
    with pytest.raises(ValueError, match=r"let only 50 go, 10 fewer; the largest ratio possible is 0\.5"):
        plan_of(*random_gammas(), ratio=0.6, min_share=0.5)


def test_the_largest_ratio_possible_is_possible():
    assert plan_of(*random_gammas(), ratio=0.5, min_share=0.5).num_removed == 50


def test_no_producer_of_a_shared_batchnorm_is_emptied():
    model = scramble(Catenated())
    with torch.no_grad():
        model.norm.weight[:4] = 0.0  # all of bare_left
    channels = map_channels(model, EXAMPLE)
    plan = make_plan(channels.named_gammas(model), channels, ratio=0.3)
    assert plan.kept["norm"][0] == 3
    assert plan.spared["norm"] == 1


def test_frozen_channels_do_not_count_for_the_ratio():
    model = scramble(nn.Sequential(block(3, 12), block(12, 5)))  # the second is the network's output
    channels = map_channels(model, EXAMPLE)
    plan = make_plan(channels.named_gammas(model), channels, ratio=0.5)
    assert (plan.num_channels, plan.num_removed) == (12, 6)


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, math.nan, math.inf])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"is not in \[0, 1\)"):
        plan_of(*random_gammas(), ratio=ratio)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gamma_that_is_not_finite_is_refused_naming_its_layer(value):
    with pytest.raises(ValueError, match=r"BatchNorm '2.1' has gammas that are NaN or infinite"):
        plan_of(torch.ones(40), [value] * 60, ratio=0.5)


def test_missing_gammas_are_refused_naming_their_layer():
    with pytest.raises(ValueError, match=r"no gammas are given for BatchNorm '2.1'"):
        make_plan({"0.1": torch.ones(40)}, MAP, ratio=0.5)


def test_floors_out_of_range_are_refused():
    with pytest.raises(ValueError, match="min_channels is 0: input should be greater than or equal to 1"):
        plan_of(*random_gammas(), ratio=0.5, min_channels=0)
    with pytest.raises(ValueError, match=r"min_share is 1.5: input should be less than or equal to 1"):
        plan_of(*random_gammas(), ratio=0.5, min_share=1.5)


def test_a_plan_survives_json():
    plan = plan_of(*random_gammas(), ratio=0.37)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)


def test_equal_plans_have_equal_digests_in_another_process():
    plan = plan_of(*random_gammas(), ratio=0.37)
    code = "import sys; from netslim.prune import Plan; print(Plan.from_json(sys.stdin.read()).digest)"
    command = [sys.executable, "-c", code]
    digest = subprocess.run(command, input=plan.to_json(), capture_output=True, text=True, check=True).stdout.strip()
    assert digest == plan.digest


def _edit(**changes):
    return lambda content: content.update(changes)


def _edit_layer(**changes):
    return lambda content: content["layers"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit(ratio=1.0), "ratio is 1.0: input should be less than 1"),
        (_edit(ratio="0.5"), "ratio is '0.5': input should be a valid number"),
        (_edit(ratio=0.36), "changed after it was written"),
        (_edit(surprise=1), "surprise is no field of it"),
        (_edit(num_removed=1), "num_removed says 1"),
        (_edit(threshold=None), "threshold of None does not go with 37"),
        (_edit(slices=[]), "layers and slices disagree about '0.1'"),
        (_edit(digest="0"), "changed after it was written"),
        (_edit_layer(kept=[]), "layers.0.kept is []: tuple should have at least 1 item"),
        (_edit_layer(kept=[2, 1]), "kept indices of '0.1' are not sorted"),
        (_edit_layer(kept=[1, 1]), "kept indices of '0.1' are not sorted"),
        (_edit_layer(kept=[0, 40]), "kept index 40 of '0.1' is beyond its width 40"),
        (_edit_layer(kept=[-1, 3]), "greater than or equal to 0"),
        (_edit_layer(kept=[0.5]), "layers.0.kept.0 is 0.5: input should be a valid integer"),
        (_edit_layer(name="2.1"), "layers name '2.1' twice"),
        (lambda content: content.pop("digest"), "it has no digest"),
        (lambda content: content.pop("slices"), "slices is missing"),
    ],
)
def test_a_tampered_plan_is_refused_in_one_line(edit, message):
    content = json.loads(plan_of(*random_gammas(), ratio=0.37).to_json())
    edit(content)
    with pytest.raises(ValueError, match="plan") as caught:
        Plan.from_json(json.dumps(content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"digest": 1}', "[" * 100_000])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(text)


def test_a_truncated_plan_is_refused():
    text = plan_of(*random_gammas(), ratio=0.37).to_json()
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(text[: len(text) // 2])


def test_the_report_shows_each_layer_before_and_after():
    plan = plan_of(torch.full((40,), 0.1), torch.arange(60) + 1, ratio=0.4)
    assert plan.departures == ("1 stay by a floor, and others go instead",)
    lines = plan.report().splitlines()
    assert lines[1].split() == ["0.1", "40", "->", "1", "1"]
    assert lines[-1] == (
        "ratio 0.4 of channels: 40 of 100 prunable channels go; threshold |gamma| <= 1; "
        "floors spare 1, rounding restores 0"
    )
