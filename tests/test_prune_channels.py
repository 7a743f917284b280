"""What the channel map finds prunable, and the reasons that it gives for the rest."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_prune_nets import EXAMPLE, NETS, Catenated, Gated, Residual, Shuffling, block, chain, scramble
from torch import Tensor, nn
from torchvision import models

from netslim.prune import largest_difference, map_channels, slim


def reasons(model: nn.Module) -> dict[str, list[str]]:
    return {layer.name: [text for text, _ in layer.reasons] for layer in map_channels(model, EXAMPLE).layers}


class Last(nn.Module):
    """A prunable block, then `between` before the last convolution."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.between, self.last = block(3, 4), block(4, 4), between, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.block(self.first(x))))


def test_a_chain_is_wholly_prunable():
    assert all(not why for why in reasons(chain(4, 6)).values())


def test_branches_that_are_concatenated_are_wholly_prunable():
    assert all(not why for why in reasons(Catenated()).values())


def test_channels_that_are_summed_are_one_class():
    stem, inner, outer = map_channels(Residual(), EXAMPLE).layers
    assert stem.classes == outer.classes
    assert len({*stem.classes, *inner.classes}) == 8 + 12


def test_a_residual_network_is_wholly_prunable():
    with torch.device("meta"):
        model = models.resnet18(weights=None)
    assert all(not why for why in reasons(model).values())


def test_a_value_for_all_channels_is_named_with_its_module():
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean((2, 3), keepdim=True) + torch.ones(4, 1, 1, device=x.device)

    (reason,) = reasons(Last(Scaled()))["block.1"]
    assert reason.startswith("'add' of values with different channels at 'between' (")
    assert reason.endswith("test_prune_channels.py:53)")


def test_each_other_reason_is_given_with_its_place():
    assert reasons(Gated()) == {
        "first.1": [],
        "deep.1": [],
        "late": ["read before its BatchNorm by 'peek'"],
        "inner.1": [],
    }


def test_moving_data_freezes_only_where_it_counts_channels():
    found = reasons(Shuffling())
    assert found["a.1"] == found["c.1"] == found["e.1"] == []
    (reason,) = found["d.1"]
    assert reason.startswith("'view' lays channels over two dimensions at ")
    assert "test_prune_nets.py:" in reason


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.Sigmoid(), "operation 'sigmoid' is not zero at zero at 'between'"),
        (nn.Hardtanh(0.5, 1.0), "operation 'hardtanh' is not zero at zero at 'between'"),
        (nn.ConstantPad2d(1, 0.5), "operation 'pad' is not zero at zero at 'between'"),
        (nn.Softmax(1), "'softmax' over channels at 'between'"),
        (nn.LocalResponseNorm(2), "operation 'local_response_norm' is not known to keep channels apart at 'between'"),
        (nn.Conv2d(4, 4, 1, groups=4), "'between' adds a bias"),
    ],
)
def test_an_operation_between_blocks_is_named(between, reason):
    (found,) = reasons(Last(between))["block.1"]
    assert found.startswith(reason)
    assert found == reason or "test_prune_channels.py:" in found


def test_a_batchnorm_without_gamma_is_not_prunable():
    model = chain(4, 6)
    model[0][1] = nn.BatchNorm2d(4, affine=False)
    assert reasons(model)["0.1"] == ["BatchNorm '0.1' has no gamma (affine=False)"]


def test_the_channels_of_a_module_that_is_used_twice_are_one():
    twice = block(4, 4)
    channels = map_channels(nn.Sequential(block(3, 4), twice, twice, block(4, 4), nn.Conv2d(4, 2, 1)), EXAMPLE)
    first, inside, last = channels.layers
    assert first.classes == inside.classes
    assert first.num_prunable == last.num_prunable == 4


def test_the_channels_of_layers_that_share_a_weight_are_one():
    model = nn.Sequential(block(3, 4), block(4, 4), block(4, 4), block(4, 4), nn.Conv2d(4, 2, 1))
    model[2][0].weight = model[1][0].weight
    classes = [layer.classes for layer in map_channels(model, EXAMPLE).layers]
    assert classes[0] == classes[1] == classes[2] != classes[3]


def test_a_parametrized_convolution_is_not_prunable():
    model = chain(4, 6)
    nn.utils.parametrizations.weight_norm(model[2][0])
    assert reasons(model)["2.1"] == ["'2.0' computes its weight from other tensors"]


def test_a_size_written_into_a_view_is_not_prunable():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.head = block(3, 4), block(4, 4), nn.Linear(4 * 1024, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.first(x)).view(-1, 4096))

    assert reasons(Fixed())["block.1"][0].startswith("the number of channels is written into 'view'")


def test_one_channel_with_several_gammas_is_one_class():
    flat = [nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12)]
    layer = map_channels(nn.Sequential(block(3, 4), *flat, nn.Linear(12, 2)), EXAMPLE).layers[1]
    assert layer.num_prunable == 12
    assert [layer.classes.count(number) for number in sorted(set(layer.classes))] == [4, 4, 4]


def test_synchronised_batchnorms_are_mapped_like_others():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(chain(4, 6))
    assert all(all(layer.prunable) for layer in map_channels(model, EXAMPLE).layers)


def test_outputs_of_the_network_stay():
    assert reasons(nn.Sequential(block(3, 4), block(4, 4)))["1.1"] == ["network output"]


def test_a_network_without_batchnorm_is_refused():
    with pytest.raises(ValueError, match="no BatchNorm"):
        map_channels(nn.Sequential(nn.Conv2d(3, 4, 1)), EXAMPLE)


def test_a_network_with_everything_frozen_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match=r"is prunable: 4 stay: network output"):
        map_channels(nn.Sequential(block(3, 4)), EXAMPLE)


class Branching(nn.Module):
    """Decides by values, and keeps one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last_seen = block(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.last_seen is None or self.last_seen.shape != x.shape:
            self.last_seen = x
        return x if x.sum() > 0 else -x


def branching_in_a_chain() -> nn.Module:
    return nn.Sequential(block(3, 6), block(6, 4), Branching(), block(4, 6), nn.Flatten(), nn.Linear(6 * 1024, 5))


class BranchingInAResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.branch = block(3, 6), block(6, 4), nn.Sequential(block(4, 4), Branching())
        self.inner, self.head = block(4, 5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head(self.inner(x + self.branch(x)).mean((2, 3)))


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("build", [branching_in_a_chain, BranchingInAResidual])
def test_a_network_is_cut_exactly_around_a_module_that_decides_by_values(build, coupling):
    torch.manual_seed(0)
    model = scramble(build())
    small, plan = slim(model, EXAMPLE, ratio=0.5, coupling=coupling)  # raises beyond 1e-5
    hidden = [name for name in plan.widths if "body" in name]
    assert len(hidden) == 1
    assert coupling == "select" or len(plan.kept[hidden[0]]) == 4
    assert plan.num_removed > 0
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-10


def test_a_module_that_decides_by_values_keeps_what_its_forward_handles_and_says_where():
    channels = map_channels(branching_in_a_chain(), EXAMPLE)
    free, before, inside, after = channels.layers
    assert free.num_prunable == after.num_prunable == 6
    assert before.reasons == inside.reasons  # one sentence for all
    assert inside.selectable
    ((reason, count),) = inside.reasons
    assert count == 4
    assert reason.startswith("'2' (")
    assert reason.endswith(") decides by values")
    assert [(end.name, end.kind) for end in channels.modules][4:6] == [
        ("2.body.0", "Conv2d"),
        ("2.body.1", "BatchNorm2d"),
    ]


def test_layers_inside_a_module_of_torch_that_calls_them_as_one_function_are_in_the_map():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = block(3, 4), block(4, 6)
            self.attend = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(self.block(self.first(x)).flatten(2).transpose(1, 2))

    channels = map_channels(Attending(), EXAMPLE[:, :, ::4, ::4])
    assert "attend.linear1" in [end.name for end in channels.modules]
    assert [layer.num_prunable for layer in channels.layers] == [4, 0]


def test_a_network_whose_own_forward_branches_on_its_input_is_mapped_within():
    class Wholly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x if x.sum() > 0 else -x)

    assert all(layer.num_prunable == layer.width for layer in map_channels(Wholly(), EXAMPLE).layers)


def test_a_batchnorm_that_a_subclass_computes_itself_is_counted():
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    model = chain(4, 6)
    model[0][1] = Own(4)
    assert reasons(model)["0.1"] == []


def test_an_example_that_does_not_fit_is_refused_naming_the_layer():
    with pytest.raises(ValueError, match=r"does not run on an example of shape \(2, 5, 8, 8\): '0.0' says"):
        map_channels(chain(4, 6), torch.zeros(2, 5, 8, 8))


def test_heads_that_only_training_runs_are_mapped_with_the_rest():
    with torch.device("meta"):
        model = models.googlenet(weights=None, aux_logits=True, init_weights=False)
    found = {layer.name: layer.num_prunable for layer in map_channels(model, EXAMPLE).layers}
    assert found["aux1.conv.bn"] == 128
    assert model.training


def test_layers_that_nothing_calls_stay_whole():
    model = Residual()
    model.spare = block(3, 4)
    assert reasons(model)["spare.1"] == ["'spare.1' is never called"]
    with pytest.warns(UserWarning, match=r"^'spare.0', 'spare.1' never called, neither in eval nor in training mode"):
        small, _ = slim(model, EXAMPLE, ratio=0.5)
    assert len(small.spare[1].weight) == 4


def test_a_network_that_reads_values_while_running_is_mapped_all_the_same():
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.grid = chain(4, 6), torch.ones(1, 1, 32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * self.grid.clone().to("cpu"))

    assert map_channels(Reading(), EXAMPLE).layers[0].num_prunable == 4


def test_a_default_device_of_the_users_makes_no_difference():
    model = Gated()
    with torch.device("meta"):
        assert map_channels(model, EXAMPLE) == map_channels(Gated(), EXAMPLE)
    assert map_channels(model, EXAMPLE).layers[0].num_prunable == 8


def test_mapping_leaves_the_model_as_it_was():
    model = chain(4, 6).train()
    before = copy.deepcopy(model.state_dict())
    map_channels(model, EXAMPLE)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_gammas_to_penalise_are_those_of_layers_with_prunable_channels():
    model = nn.Sequential(block(3, 4), block(4, 5))  # the second is the network's output
    channels = map_channels(model, EXAMPLE)
    assert [id(gamma) for gamma in channels.gammas(model)] == [id(model[0][1].weight)]
    assert {name: mask.tolist() for name, mask in channels.prunable(model).items()} == {"0.1": [True] * 4}
    both = [id(model[0][1].weight), id(model[1][1].weight)]
    assert [id(gamma) for gamma in channels.gammas(model, "select")] == both


def test_a_map_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"no BatchNorm of 4 at '0.1'"):
        map_channels(chain(4, 6), EXAMPLE).gammas(chain(5, 6))


def test_the_map_prints_one_line_per_batchnorm():
    lines = str(map_channels(NETS["residual"](), EXAMPLE)).splitlines()
    assert lines[-1] == "28 of 28 channels are prunable"
    assert lines[3].split() == ["outer.1", "8", "8", "outer.0", "->", "inner.0,", "head"]
    assert len(lines) == 5


def test_channels_that_the_same_layers_share_are_one_family():
    shared, inner = map_channels(Residual(), EXAMPLE).families()
    assert (shared.num_classes, shared.num_gammas, inner.num_classes) == (8, 16, 12)
    assert shared.norms == ("stem.1", "outer.1")
    assert shared.makers == ("stem.0", "outer.0")
    assert shared.readers == ("inner.0", "head")
    assert not shared.why


def test_families_hold_every_gamma_once_and_are_prunable_where_the_layers_are():
    channels = map_channels(Shuffling(), EXAMPLE)
    families = channels.families()
    assert sum(family.num_gammas for family in families) == sum(layer.width for layer in channels.layers)
    free = sum(family.num_gammas for family in families if not family.why)
    assert free == sum(layer.num_prunable for layer in channels.layers)
    assert 0 < free < sum(family.num_gammas for family in families)


def test_the_table_has_a_row_per_family_and_states_each_reason_once():
    lines = map_channels(Gated(), EXAMPLE).table().splitlines()
    assert " ".join(lines[1].split()) == "8 16 first.1, deep.1 first.0, deep.0 -> deep.0, early prunable"
    assert lines[2].endswith("early -> inner.0, peek            one by one [1]")
    assert lines[4:] == ["[1] read before its BatchNorm by 'peek'", "25 of 31 channels are prunable"]


def test_the_tables_of_a_deep_network_name_only_the_first_layers():
    with torch.device("meta"):
        model = models.densenet121(weights=None)
    channels = map_channels(model, EXAMPLE)
    assert max(len(family.norms) for family in channels.families()) > 20
    for text in (channels.table(), str(channels)):
        assert max(len(line) for line in text.splitlines()) < 500


def test_the_summary_gives_the_commonest_reasons_in_one_line():
    channels = map_channels(Gated(), EXAMPLE)
    assert channels.summary() == "25 of 31 channels are prunable; 6 stay: read before its BatchNorm by 'peek'"
    assert channels.summary("select") == "31 of 31 channels are removable one by one"
