"""Networks from torchvision's registry, cut under both couplings: each equal to its masked model, each still trains."""

import time
import warnings
from dataclasses import dataclass

import pytest
import torch
import torchvision
from test_prune_nets import scramble
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torchvision import models

from netslim.prune import ChannelMap, Plan, cost, cut, make_plan, map_channels, masked

# One of each way to couple channels.
REPRESENTATIVE = {
    "resnet18": 32,  # residual
    "resnext50_32x4d": 32,  # grouped
    "densenet121": 32,  # pre-activation, concatenated
    "mobilenet_v2": 32,  # depthwise
    "mobilenet_v3_small": 32,  # gates
    "efficientnet_b0": 32,  # gates, stochastic depth
    "mnasnet0_5": 32,
    "regnet_y_400mf": 32,  # grouped, gates
    "shufflenet_v2_x0_5": 32,  # chunks and shuffles
    "googlenet": 64,  # heads that only training runs
    "inception_v3": 299,
}


def leaves(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a network with random gammas, betas and heads."""
    with warnings.catch_warnings():  # googlenet and inception_v3 warn of their slow initialisation
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = scramble(models.get_model(name, weights=None), seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # some start so small that no logit would show a wrong channel
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.BatchNorm2d):  # a layer's last channel below zero would end the signal in a ReLU
            module.bias.data.abs_()
    return model.eval()


def calibrate(model: nn.Module, plan: Plan, example: Tensor) -> None:
    """Give every BatchNorm statistics near those of the masked network.

    With others the signal of a deep network dies out or explodes, and its float64 logits have no 10 digits to compare.
    """
    twin = masked(model, plan).train()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        twin(example)
        for name, norm in model.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                found = twin.get_submodule(name)
                noise = 0.1 * torch.randn(norm.num_features)
                norm.running_mean.copy_(found.running_mean + noise * found.running_var.sqrt())
                norm.running_var.copy_(found.running_var * (torch.rand(norm.num_features) + 0.5))


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def difference(model: nn.Module, small: nn.Module, plan: Plan, example: Tensor) -> tuple[float, float]:
    """Measure the largest difference from the masked network in float64, relative to how much images differ.

    Also how far the masked network's own logits move, in the same measure, when its images change in the 15th digit:
    untrained networks of a hundred layers magnify rounding a million times and more.
    """
    twin, images = masked(model, plan).double(), example.double()
    with torch.no_grad():
        want, near, have = twin(images), twin(images * (1 + 1e-15)), small.double()(images)
    small.float()
    spread = (want[0] - want[1]).abs().max().item()
    if spread <= 1e-5 * want.abs().max().item():
        raise NoSignalError("the images look alike to the network, so nothing is shown")
    return (want - have).abs().max().item() / spread, (want - near).abs().max().item() / spread


def assert_trains(small: nn.Module, example: Tensor) -> None:
    small.train()
    loss = sum(output.square().mean() for output in leaves(small(example)))
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in small.named_parameters():
        assert parameter.numel(), name
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


class NoSignalError(Exception):
    """Random scales happen to remove all that a narrow layer passes on."""


@dataclass
class Result:
    plan: Plan
    difference: float
    rounding: float
    seconds: float
    params: int
    macs: int


def slimmed(model: nn.Module, example: Tensor, coupling: str) -> Result:
    started = time.perf_counter()
    channels: ChannelMap = map_channels(model, example, coupling)
    plan = make_plan(channels.named_gammas(model, coupling), channels, ratio=0.5, coupling=coupling)
    seconds = time.perf_counter() - started
    calibrate(model, plan, example)
    started = time.perf_counter()
    small = cut(model, plan)
    seconds += time.perf_counter() - started
    found, rounding = difference(model, small, plan, example)
    bill = cost(small, example)
    assert_trains(small, example)
    return Result(plan, found, rounding, seconds, bill.params, bill.macs)


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_network_of_each_kind_is_cut_exactly_and_trains(name, coupling):
    result = slimmed(build(name), images(REPRESENTATIVE[name]), coupling)
    plan = result.plan
    assert result.difference < 1e-10
    assert plan.num_removed >= 0.99 * plan.num_asked
    if coupling == "select":
        assert plan.num_removed == plan.num_asked == plan.num_channels // 2
        assert plan.num_channels == sum(plan.widths.values())
    else:
        assert not plan.selections


def has_batchnorm(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = models.get_model(name, weights=None)
        except NotImplementedError:  # some compute their widths with tensors
            model = models.get_model(name, weights=None)
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def example_for(model: nn.Module) -> Tensor:
    """Find the smallest of the usual images that the network accepts, also in training."""
    for size in (64, 224):
        try:
            map_channels(model, images(size))
        except ValueError as error:
            if "does not run" not in str(error):
                raise
        else:
            return images(size)
    return images(299)


def slimmed_by_some_seed(name: str, example: Tensor, coupling: str) -> Result:
    for seed in range(3):
        try:
            return slimmed(build(name, seed), example, coupling)
        except NoSignalError as error:
            last = error
    raise last


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_network_of_the_registry_is_cut_exactly_and_trains():
    names = [name for name in models.list_models(module=torchvision.models) if has_batchnorm(name)]
    failures = {}
    heads = ("network", "coupling", "removed", "params", "MACs", "seconds")
    print("\n{:<20} {:<7} {:>15} {:>12} {:>14} {:>7}  difference, rounding".format(*heads))
    for name in names:
        example = example_for(build(name))
        for coupling in ("group", "select"):
            try:
                result = slimmed_by_some_seed(name, example, coupling)
                if not result.difference < max(1e-10, 10 * min(result.rounding, 1e-6)):
                    raise AssertionError(f"differs by {result.difference:.1e}")
            except Exception as error:
                failures[name, coupling] = repr(error)
                print(f"{name:<20} {coupling:<7} {error!r:.300}", flush=True)
                continue
            count = f"{result.plan.num_removed}/{result.plan.num_channels}"
            print(
                f"{name:<20} {coupling:<7} {count:>15} {result.params:>12,} {result.macs:>14,} "
                f"{result.seconds:7.2f}  {result.difference:.1e}  {result.rounding:.1e}",
                flush=True,
            )
    print(f"{2 * len(names) - len(failures)} of {2 * len(names)}")
    assert len(names) >= 58
    assert not failures
