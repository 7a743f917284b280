"""Networks from torchvision's registry, cut under both couplings: each equal to its masked model, each still trains."""

import copy
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
from torchvision.ops import StochasticDepth

from netslim.prune import ChannelMap, Plan, cost, cut, make_plan, map_channels, masked

# One of each way to couple channels.
REPRESENTATIVE = {
    "resnet18": 32,  # residual
    "resnext50_32x4d": 32,  # grouped
    "densenet121": 32,  # pre-activation, concatenated
    "mobilenet_v2": 32,  # depthwise
    "mobilenet_v3_small": 32,  # gates
    "efficientnet_b0": 32,  # gates, stochastic depth
    "mnasnet0_5": 64,
    "regnet_y_400mf": 32,  # grouped, gates
    "shufflenet_v2_x0_5": 32,  # chunks and shuffles
    "googlenet": 64,  # heads that only training runs
    "inception_v3": 299,
}


def leaves(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def build(name: str) -> nn.Module:
    """Build a network with random gammas, betas and heads.

    The seed is one under which no BatchNorms around a narrow depthwise convolution lose, gamma by gamma, every channel
    that they have in common: such a network says the same of all images.
    """
    with warnings.catch_warnings():  # googlenet and inception_v3 warn of their slow initialisation
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = scramble(models.get_model(name, weights=None), seed=1)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # some start so small that no logit would show a wrong channel
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.BatchNorm2d):
            # a layer's last channel below zero would end the signal in a ReLU, and small ones magnify rounding
            module.bias.data.abs_().mul_(3)
    return model.eval()


def images(size: int) -> Tensor:
    """Make many small images or few large ones: the variance of a deep layer needs more than one place."""
    return torch.randn(max(4, 1024 // size), 3, size, size, generator=torch.Generator().manual_seed(1))


def with_heads(model: nn.Module) -> nn.Module:
    """Switch to training all but what makes its outputs random: then heads that only training runs are compared too."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout, StochasticDepth)):
            module.eval()
    return model


def calibrate(model: nn.Module, plan: Plan, example: Tensor) -> None:
    """Give every BatchNorm random statistics near those of what it reads in the masked network.

    Layer by layer, each behind the random statistics of those before it: otherwise their errors multiply, and deep
    networks end in logits of 1e5 that hang on the last digit of an image.
    """
    twin = with_heads(masked(model, plan))

    def measure(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        variance.clamp_min_(0.3 * float(variance.mean()))  # of four places it may happen to be nearly zero
        norm.running_mean.copy_(mean + 0.1 * torch.randn(norm.num_features) * variance.sqrt())
        norm.running_var.copy_(variance * (torch.rand(norm.num_features) + 0.5))

    norms = {name: module for name, module in twin.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.register_forward_pre_hook(measure)
    with torch.no_grad():
        twin(example)
        for name, norm in norms.items():
            model.get_submodule(name).running_mean.copy_(norm.running_mean)
            model.get_submodule(name).running_var.copy_(norm.running_var)


def differences(want: list[Tensor], have: list[Tensor]) -> tuple[float, float]:
    """Measure the largest difference relative to an output's largest value, and relative to how much images differ."""
    assert [t.shape for t in want] == [t.shape for t in have]
    pairs = list(zip(want, have, strict=True))
    by_size = max((a - b).abs().max() / a.abs().max() for a, b in pairs)
    by_spread = max((a - b).abs().max() / (a[0] - a[1]).abs().max() for a, b in pairs)
    return float(by_size), float(by_spread)


@torch.no_grad()
def compare(model: nn.Module, small: nn.Module, plan: Plan, example: Tensor) -> tuple[float, float, float]:
    """Compare with the masked network: in float32, in float64, and in float64 relative to how much images differ."""
    twin = with_heads(masked(model, plan))
    with_heads(small)
    single, _ = differences(leaves(twin(example)), leaves(small(example)))
    want, have = leaves(twin.double()(example.double())), leaves(small.double()(example.double()))
    small.float()
    assert all((t[0] - t[1]).abs().max() > 0.01 * t.abs().max() for t in want), "the images look alike to the network"
    return single, *differences(want, have)


def assert_trains(small: nn.Module, example: Tensor) -> None:
    small.train()
    loss = sum(output.square().mean() for output in leaves(small(example)))
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in small.named_parameters():
        assert parameter.numel(), name
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@dataclass
class Result:
    plan: Plan
    float32: float
    float64: float
    of_the_spread: float
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
    two = example[:2]
    found = compare(model, small, plan, two)
    bill = cost(small, two)
    assert_trains(small, two)
    return Result(plan, *found, seconds, bill.params, bill.macs)


def assert_exact(result: Result) -> None:
    assert result.float32 <= 1e-5
    assert result.float64 <= 1e-10


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_network_of_each_kind_is_cut_exactly_and_trains(name, coupling):
    result = slimmed(build(name), images(REPRESENTATIVE[name]), coupling)
    assert_exact(result)
    plan = result.plan
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
    model = copy.deepcopy(model)
    for size in (128, 224):
        try:
            model.eval()(images(size))
            model.train()(images(size))
        except (RuntimeError, ValueError):
            continue
        return images(size)
    return images(299)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_network_of_the_registry_is_cut_exactly_and_trains():
    names = [name for name in models.list_models(module=torchvision.models) if has_batchnorm(name)]
    failures = {}
    heads = ("network", "coupling", "removed", "params", "MACs", "seconds", "float32", "float64", "of the spread")
    print("\n{:<20} {:<7} {:>15} {:>12} {:>14} {:>7}  {}  {}  {}".format(*heads))
    for name in names:
        example = example_for(build(name))
        for coupling in ("group", "select"):
            try:
                result = slimmed(build(name), example, coupling)
                count = f"{result.plan.num_removed}/{result.plan.num_channels}"
                print(
                    f"{name:<20} {coupling:<7} {count:>15} {result.params:>12,} {result.macs:>14,} "
                    f"{result.seconds:7.2f}  {result.float32:.1e}  {result.float64:.1e}  {result.of_the_spread:.1e}",
                    flush=True,
                )
                assert_exact(result)
            except Exception as error:
                failures[name, coupling] = repr(error)
                print(f"{name:<20} {coupling:<7} {error!r:.300}", flush=True)
    print(f"{2 * len(names) - len(failures)} of {2 * len(names)}")
    assert len(names) >= 58
    assert not failures
