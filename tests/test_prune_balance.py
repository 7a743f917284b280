"""Balancing changes no output, only what the network is like to train."""

import copy

import pytest
import torch
from test_prune_nets import NETS, block, scramble
from test_prune_repair import calibration, difference, plan_for
from torch import Tensor, nn

from netslim.prune import RepairConfig, cut, repair
from netslim.prune.repair.balance import GAMMA, balance


def of_sparse_sizes(model: nn.Module) -> nn.Module:
    """Small gammas and uneven filters, as sparsity training and least squares leave them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight *= 0.05
                module.bias *= 0.05
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.weight *= 3 * torch.rand(len(module.weight), generator=generator).view(
                    -1, *(1,) * (module.weight.dim() - 1)
                )
    return model.eval()


def plain() -> nn.Module:
    """Three blocks and a linear layer, in the sizes of a sparse network."""
    torch.manual_seed(0)
    head = [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 10)]
    return of_sparse_sizes(scramble(nn.Sequential(block(3, 12), block(12, 14), block(14, 10), *head)))


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("name", ["chain", "catenated", "residual", "gated", "shuffling", "resized"])
def test_no_output_changes_whatever_the_network(name: str, coupling: str) -> None:
    torch.manual_seed(0)
    model = of_sparse_sizes(scramble(NETS[name]()))
    model = cut(model, plan_for(model, 0.3, side=32, coupling=coupling))
    balanced = copy.deepcopy(model)
    balance(balanced, calibration(64, side=32))
    assert difference(model, balanced, 32) < 1e-4
    assert any(not torch.equal(value, balanced.state_dict()[key]) for key, value in model.state_dict().items())


def test_gammas_and_filters_get_the_sizes_of_new_ones_and_the_last_gammas_that_of_the_classifier() -> None:
    model = plain()
    balance(model, calibration(64))
    *inner, last = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [rms(norm.weight) for norm in inner] == pytest.approx([GAMMA] * len(inner), rel=1e-5)
    for layer in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
        sizes = layer.weight.detach().flatten(1).square().mean(1).sqrt()
        assert torch.allclose(sizes, torch.tensor((2 / fan_out) ** 0.5).expand_as(sizes), rtol=1e-4)
    (classifier,) = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert float(last.weight.detach().norm()) == pytest.approx(float(classifier.weight.detach().norm()), rel=1e-5)


def test_training_begins_with_the_function_that_evaluation_has() -> None:
    model = plain()
    images = torch.cat([chunk.images for chunk in calibration(64).read()])
    with torch.no_grad():
        before = model(images)
        assert rms(copy.deepcopy(model).train()(images) - before) > 0.1 * rms(before)
        balance(model, calibration(64))
        assert rms(model.train()(images) - before) < 1e-3 * rms(before)


def test_dead_channels_and_layers_without_gammas_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)]
    model = scramble(nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))).eval()
    with torch.no_grad():
        model[3].weight[2] = 0
        model[4].weight.zero_()
    balanced = copy.deepcopy(model)
    balance(balanced, calibration(64))
    assert difference(model, balanced) < 1e-5
    assert torch.equal(balanced[1].running_mean, model[1].running_mean)
    assert all(torch.isfinite(value).all() for value in balanced.state_dict().values())


def test_where_balancing_would_change_outputs_it_is_undone() -> None:
    """Gammas at the end of float32's range: what makes them as large as new ones has no float32."""
    torch.manual_seed(0)
    blocks = [block(3, 6), block(6, 8), block(8, 8), block(8, 8)]
    model = scramble(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    model = of_sparse_sizes(model)
    nn.init.constant_(model[2][1].weight, 1e-44)
    plan = plan_for(model, 0.0)
    images = calibration(256)
    config = RepairConfig(steps=("recalibrate",), auto=False)
    repaired, report = repair(model, cut(model, plan), plan, images, config)
    assert not report.is_balanced
    assert "balanced" not in str(report)
    assert "; balance, which should change nothing, came to " in str(report)
    assert torch.equal(repaired[0][1].weight, model[0][1].weight)
