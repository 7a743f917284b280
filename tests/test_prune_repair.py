"""A repair restores what can be restored, says what it did, and never leaves the network worse."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from test_prune_nets import NETS, chain, scramble
from torch import Tensor, nn

from netslim.prune import Calibration, Chunk, Plan, RepairConfig, cut, make_plan, map_channels, repair
from netslim.prune.repair.absorption import absorb
from netslim.prune.repair.recalibration import recalibrate
from netslim.prune.repair.reconstruction import reconstruct
from netslim.train import EngineConfig, Runtime

SIZE = 8


def images_and_labels(count: int, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, side, side, generator=generator), torch.randint(0, 10, (count,), generator=generator)


def calibration(count: int = 256, side: int = 16, index: int = 0, ranks: int = 1, **more: object) -> Calibration:
    """Random images in chunks, of which each rank reads every so-many-th."""
    images, labels = images_and_labels(count, side)
    chunks = [Chunk(n, *pair) for n, pair in enumerate(zip(images.split(SIZE), labels.split(SIZE), strict=True))]
    return Calibration(read=lambda: chunks[index::ranks], num_images=count, example=images[:2], **more)


def plan_for(model: nn.Module, ratio: float, side: int = 16, **rules: object) -> Plan:
    channels = map_channels(model, torch.zeros(1, 3, side, side), rules.get("coupling", "group"))
    return make_plan(channels.named_gammas(model, rules.get("coupling", "group")), channels, ratio=ratio, **rules)


def difference(model: nn.Module, small: nn.Module, side: int = 16) -> float:
    """Root mean square over other images, relative to that of the model's outputs."""
    images = torch.randn(64, 3, side, side, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        want, have = model.eval()(images), small.eval()(images)
    return float((have - want).square().mean().sqrt() / want.square().mean().sqrt())


def silence(model: nn.Module, ratio: float) -> Plan:
    """Set the gammas to zero of the channels that a plan removes; they still give their betas."""
    plan = plan_for(model, ratio)
    with torch.no_grad():
        for layer in plan.layers:
            gone = sorted(set(range(layer.width)) - set(layer.kept))
            model.get_submodule(layer.name).weight[gone] = 0
    return plan


def without_borders() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 10, 3, bias=False)]
    layers += [nn.BatchNorm2d(10), nn.SiLU(), nn.Conv2d(10, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return scramble(nn.Sequential(*layers, nn.Linear(8, 10))).eval()


def test_constants_of_removed_channels_are_absorbed_exactly_where_nothing_is_padded():
    model = without_borders()
    plan = silence(model, 0.5)
    small = cut(model, plan)
    assert difference(model, small) > 0.01
    assert absorb(model, small, plan, images_and_labels(2)[0]) == ["4", "7"]
    assert difference(model, small) < 1e-6


def test_at_padded_borders_absorbing_takes_the_mean_and_comes_nearer():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = silence(model, 0.5)
    small = cut(model, plan)
    before = difference(model, small)
    assert absorb(model, small, plan, images_and_labels(2)[0]) == ["2.0", "3.0", "6", "10"]
    assert 0 < difference(model, small) < 0.5 * before


class Gated(nn.Module):
    """Channels behind a gate that looks at the image: no beta is a constant there."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), nn.Sigmoid())
        self.tail = nn.Sequential(nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(self.tail(x * self.gate(x)).mean((2, 3)))


def test_channels_behind_a_gate_are_not_taken_for_constants():
    torch.manual_seed(0)
    model = scramble(Gated()).eval()
    plan = silence(model, 0.5)
    small = cut(model, plan)
    assert "tail.0" not in absorb(model, small, plan, images_and_labels(2)[0])


def doubled() -> tuple[nn.Module, Plan]:
    """A chain in which every second channel says the same as the one before, and a plan that removes the twins."""
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for layer, norm in zip(convolutions, norms, strict=True):
            for tensor in (layer.weight, norm.running_mean, norm.running_var):
                tensor[1::2] = tensor[::2]
            norm.weight[::2] += 1
            norm.weight[1::2] = norm.weight[::2] / 2.2  # smaller than all others: these go
            norm.bias[1::2] = norm.bias[::2] / 2.2
    return model, plan_for(model, 0.5, exclude=("7",))


def test_what_the_kept_channels_can_say_is_reconstructed_to_rounding():
    model, plan = doubled()
    small = cut(model, plan)
    assert difference(model, small) > 0.01
    assert reconstruct(model, small, plan, calibration())
    assert difference(model, small) < 1e-4


def test_the_system_of_a_convolution_is_that_of_torch():
    """Whatever stride, dilation, padding, groups: with all that is missing in its span, a layer is found again."""
    options = [{"stride": 2}, {"dilation": 2, "padding": 3}, {"padding": 1, "padding_mode": "reflect"}]
    options += [{"groups": 4}, {"groups": 8, "padding": (0, 1)}, {"padding": "same"}, {}]
    for more in options:
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, **more),
            nn.AdaptiveAvgPool2d(2),
        ]
        head = [nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)]
        model = nn.Sequential(*layers, *head).eval()
        plan = plan_for(model, 0.0)
        small = cut(model, plan)
        with torch.no_grad():
            small[3].weight.normal_()
            small[3].bias.normal_()
        assert "3" in reconstruct(model, small, plan, calibration()), more
        assert difference(model, small) < 1e-4, more


def test_a_constant_without_a_bias_goes_into_the_mean_of_the_batchnorm():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    model = scramble(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))).eval()
    plan = plan_for(model, 0.0)
    small = cut(model, plan)
    with torch.no_grad():
        small[1].bias += 1
    assert reconstruct(model, small, plan, calibration())[0] == "2"
    assert difference(model, small) < 1e-4
    assert not torch.equal(small[3].running_mean, model[3].running_mean)


def test_recalibrated_statistics_are_those_of_all_images_together():
    torch.manual_seed(0)
    model = scramble(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.LazyLinear(10)))
    images, _ = images_and_labels(100)
    model(images[:1])
    recalibrate(model, calibration(100))
    values = model[0](images).double()
    assert torch.allclose(model[1].running_mean.double(), values.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[1].running_var.double(), values.var((0, 2, 3), unbiased=False), rtol=1e-5)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("name", ["chain", "catenated", "residual", "gated", "shuffling", "resized"])
def test_every_kind_of_network_comes_nearer_to_what_it_was(name, coupling):
    torch.manual_seed(0)
    model = scramble(NETS[name]()).eval()
    plan = plan_for(model, 0.3, side=32, coupling=coupling)
    small = cut(model, plan)
    config = RepairConfig(steps=("reconstruct",), auto=False)
    repaired, _ = repair(model, small, plan, calibration(256, side=32), config)
    assert difference(model, repaired, 32) < 0.8 * difference(model, small, 32)


def own_labels(model: nn.Module, count: int = 256) -> Calibration:
    """Images whose labels are what this network says: no other can do better."""
    images, _ = images_and_labels(count)
    with torch.no_grad():
        return Calibration.of(images, model.eval()(images).argmax(1))


def test_a_step_that_raises_the_loss_is_undone_and_said():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = plan_for(model, 0.5)
    small = cut(model, plan)
    steps = ("absorb", "reconstruct")
    repaired, report = repair(model, small, plan, own_labels(small), RepairConfig(steps=steps))
    assert report.kept == ()
    assert report.loss == report.loss_cut
    assert str(report).count("(undone)") == 2
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in repaired.state_dict().items())
    forced, report = repair(model, small, plan, own_labels(small), RepairConfig(steps=steps, auto=False))
    assert report.loss > report.loss_cut
    assert difference(model, forced) < difference(model, small)


def test_neither_the_model_nor_the_cut_network_is_changed():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = plan_for(model, 0.5)
    small = cut(model, plan)
    before = [copy.deepcopy(network.state_dict()) for network in (model, small)]
    repair(model, small, plan, own_labels(model))
    for network, want in zip((model, small), before, strict=True):
        assert all(torch.equal(value, want[key]) for key, value in network.state_dict().items())


def repair_on_ranks() -> dict[str, Tensor]:
    run = Runtime(EngineConfig(), 0)
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = plan_for(model, 0.5)
    images = calibration(index=run.rank, ranks=run.world_size, sum_over_ranks=run.sum_over_ranks)
    repaired, _ = repair(model, cut(model, plan), plan, images, RepairConfig(auto=False))
    run.check_equal(repaired, "the test")
    run.close()
    return repaired.state_dict()


def test_two_ranks_repair_as_one_does_and_are_bitwise_equal(tmp_path):
    (one,) = run_ranks(repair_on_ranks, 1, tmp_path)
    first, second = run_ranks(repair_on_ranks, 2, tmp_path)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    for key, value in first.items():
        assert (value - one[key]).abs().max() <= 1e-6 * one[key].abs().max(), key


def test_a_rank_without_images_takes_part():
    """As with more ranks than chunks: what it gives to every sum is zero."""
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = plan_for(model, 0.5)
    whole, sums = calibration(), []
    want, _ = repair(model, cut(model, plan), plan, replace(whole, sum_over_ranks=lambda v: sums.append(v) or v))
    each = iter(sums)
    none = replace(whole, read=lambda: [], sum_over_ranks=lambda values: values + next(each))
    have, _ = repair(model, cut(model, plan), plan, none)
    assert all(torch.equal(value, want.state_dict()[key]) for key, value in have.state_dict().items())


def test_too_few_images_are_refused_with_the_number_that_is_needed():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 30)).eval()
    plan = plan_for(model, 0.1)
    small = cut(model, plan)
    with pytest.raises(ValueError, match="a repair needs at least 16 images to measure by, 8 are given"):
        repair(model, small, plan, calibration(8))
    with pytest.raises(ValueError, match="calibration images come in at least 8 chunks"):
        repair(model, small, plan, calibration(32))
    with pytest.raises(ValueError, match=r"'6' has \d+ weights .* for 64 calibration images to determine") as caught:
        repair(model, small, plan, calibration(64))
    enough = int(re.search(r"at least (\d+)", str(caught.value))[1])
    repair(model, small, plan, calibration(-(-enough // 64) * 64))


def test_activations_that_are_not_finite_are_refused():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = plan_for(model, 0.5)
    small = cut(model, plan)
    with torch.no_grad():
        model[3][1].weight[:] = float("inf")
    with pytest.raises(ValueError, match="the activations at '6' are NaN or infinite"):
        repair(model, small, plan, calibration(), RepairConfig(steps=("reconstruct",)))


def test_channels_that_say_nothing_leave_a_system_that_is_still_solved():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = plan_for(model, 0.3)
    with torch.no_grad():
        for layer in plan.layers[:3]:
            model.get_submodule(layer.name).weight[list(layer.kept[:2])] = 0
            model.get_submodule(layer.name).bias[list(layer.kept[:2])] = 0
    repaired, _ = repair(model, cut(model, plan), plan, calibration(), RepairConfig(auto=False))
    assert all(torch.isfinite(value).all() for value in repaired.state_dict().values())
