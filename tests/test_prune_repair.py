"""A repair restores what can be restored, says what it did, and never leaves the network worse."""

import copy
import re
import resource
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from test_prune_nets import NETS, chain, scramble
from torch import Tensor, nn

from netslim.prune import Calibration, Chunk, Plan, RepairConfig, cut, make_plan, map_channels, repair
from netslim.prune.repair import foresight
from netslim.prune.repair.absorption import absorb
from netslim.prune.repair.foresight import foreseen
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


def test_too_few_images_to_measure_by_are_refused():
    model = scramble(chain(12, 10, 30)).eval()
    plan = plan_for(model, 0.1)
    small = cut(model, plan)
    with pytest.raises(ValueError, match="a repair needs at least 16 images to measure by, 8 are given"):
        repair(model, small, plan, calibration(8))
    with pytest.raises(ValueError, match="calibration images come in at least 8 chunks"):
        repair(model, small, plan, calibration(32))


def test_a_layer_that_the_images_cannot_determine_stays_as_it_is_and_the_report_says_how_many_would():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 30)).eval()
    plan = plan_for(model, 0.1)
    small = cut(model, plan)
    config = RepairConfig(steps=("reconstruct",), auto=False, balance=False)
    repaired, report = repair(model, small, plan, calibration(64), config)
    (note,) = report.notes
    assert re.search(r"reconstruct leaves 1 of 5 layers as they are: '6' with up to \d+ weights for each output", note)
    assert note in str(report)
    assert torch.equal(repaired[6].weight, small[6].weight)
    assert torch.equal(repaired[6].bias, small[6].bias)
    assert not torch.equal(repaired[3][0].weight, small[3][0].weight)
    enough = int(re.search(r"about (\d+) images would", note)[1])
    assert enough > 64
    repaired, report = repair(model, small, plan, calibration(-(-enough // 64) * 64), config)
    assert report.notes == ()
    assert not torch.equal(repaired[6].weight, small[6].weight)


def test_fewer_samples_than_the_shapes_promise_leave_a_layer_as_it_is_too():
    """A layer that reads no image gives as many samples for each pass, not for each image."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
            self.shift = nn.Linear(50, 10)
            self.tail = nn.Conv2d(12, 10, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.body(x)).mean((2, 3)) + self.shift(x.new_ones(1, 50))

    torch.manual_seed(0)
    model = scramble(Shifted()).eval()
    plan = plan_for(model, 0.0)
    _, report = repair(model, cut(model, plan), plan, calibration(128), RepairConfig(auto=False))
    assert "reconstruct leaves 1 of 3 layers as they are: 'shift'" in report.notes[0]


class Odd(nn.Module):
    """With a layer that is called twice, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.again = nn.Conv2d(12, 12, 3, padding=1)
        self.spare = nn.BatchNorm2d(4)
        self.tail = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        near = self.body(x)
        far = nn.functional.avg_pool2d(near, 2)
        return self.tail(torch.cat([self.again(each).relu().mean((2, 3)) for each in (near, far)], 1))


def test_a_layer_that_is_called_twice_is_said_to_be_left_and_one_that_never_is_keeps_its_statistics():
    torch.manual_seed(0)
    model = scramble(Odd()).eval()
    plan = plan_for(model, 0.0)
    config = RepairConfig(steps=("reconstruct", "recalibrate"), auto=False)
    repaired, report = repair(model, cut(model, plan), plan, calibration(128), config)
    (note,) = report.notes
    assert foreseen(model, torch.zeros(1, 3, 16, 16), 128) == [note]
    assert note.startswith("reconstruct leaves 1 of 3 layers as they are: 'again', since they are no Conv2d or Linear")
    assert torch.equal(repaired.spare.running_mean, model.spare.running_mean)


def wide() -> nn.Module:
    """A linear layer of 25,088 inputs, as VGG-16 has at 224 x 224: a matrix of its second moments takes 5 GB."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 512, 3), nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    return scramble(nn.Sequential(*layers, nn.Linear(25088, 10))).eval()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_the_memory_of_a_repair_is_bounded_however_wide_a_layer_is():
    model = wide()
    plan = plan_for(model, 0.02)
    before = peak()
    _, report = repair(model, cut(model, plan), plan, calibration(64, side=9))
    assert peak() - before < 1 << 30
    (note,) = report.notes
    assert re.search(r"leaves 1 of 2 layers as they are: '5' with up to 2\d{4} weights .* more than 10240 would", note)


def test_a_layer_wider_than_the_bound_stays_though_the_images_would_determine_it(monkeypatch):
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    plan = plan_for(model, 0.3)
    small = cut(model, plan)
    monkeypatch.setattr(foresight, "WIDEST", small[3][0].weight[0].numel() - 1)
    config = RepairConfig(steps=("reconstruct",), auto=False, balance=False)
    repaired, report = repair(model, small, plan, calibration(), config)
    assert "'3.0'" in report.notes[0]
    assert torch.equal(repaired[3][0].weight, small[3][0].weight)
    assert not torch.equal(repaired[6].weight, small[6].weight)


def test_what_will_be_left_is_foreseen_from_shapes_and_counts():
    example = torch.zeros(1, 3, 16, 16)
    assert foreseen(chain(12, 10, 14), example, 2048) == []
    (line,) = foreseen(chain(12, 10, 300), example, 138)
    assert "reconstruct leaves 1 of 5 layers as they are: '6' with up to 1200 weights for each output" in line
    assert "more than 138 images determine" in line
    assert (
        "a repair needs at least 16 images to measure by, 12 are given" in foreseen(chain(12, 10, 14), example, 12)[0]
    )
    before = peak()
    (line,) = foreseen(wide(), torch.zeros(1, 3, 224, 224), 1 << 20)
    assert "'5' with up to 25088 weights for each output, and more than 10240 would take too much memory" in line
    assert peak() - before < 1 << 28


@pytest.mark.parametrize("count", [16, 33])
def test_chunks_of_a_single_value_do_not_stop_a_recalibration(count):
    """BatchNorm1d, and maps of one place, in chunks of one image: of 16 images all are, of 33 the last one is."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = scramble(nn.Sequential(*body, nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))).eval()
    plan = plan_for(model, 0.3)
    images = Calibration.of(*images_and_labels(count))
    repaired, report = repair(model, cut(model, plan), plan, images, RepairConfig(auto=False))
    assert report.kept == ("absorb", "reconstruct", "recalibrate")
    assert any(note.startswith("recalibrate: '6' met a chunk of a single value") for note in report.notes)
    assert all(torch.isfinite(value).all() for value in repaired.state_dict().values())
    values = repaired[:6].eval()(images_and_labels(count)[0]).detach().double()
    torch.testing.assert_close(repaired[6].running_mean.double(), values.mean(0), rtol=1e-3, atol=1e-4)


def test_a_repair_leaves_every_module_in_the_mode_it_was_in_and_gives_those_of_the_cut_network():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14))
    plan = plan_for(model.eval(), 0.3)
    small = cut(model, plan).train()
    model.train()[0].eval()
    small[3].eval()
    before = [[module.training for module in network.modules()] for network in (model, small)]
    repaired, report = repair(model, small, plan, calibration())
    assert report.kept
    assert [[module.training for module in network.modules()] for network in (model, small)] == before
    assert [module.training for module in repaired.modules()] == before[1]
    statistics = repaired[0][1].running_mean.clone()
    repaired(images_and_labels(8)[0])
    assert not torch.equal(repaired[0][1].running_mean, statistics)


def test_a_repair_that_fails_leaves_modes_too():
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14))
    plan = plan_for(model.eval(), 0.5)
    small = cut(model, plan)
    with torch.no_grad():
        model[3][1].weight[:] = float("inf")
    model.train()
    with pytest.raises(ValueError, match="NaN or infinite"):
        repair(model, small, plan, calibration(), RepairConfig(steps=("reconstruct",)))
    assert all(module.training for module in model.modules())


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
