"""The CIFAR networks of the slimming literature, cut: equal to the masked network, exactly as many channels gone."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from netslim.prune import Coupling, cut, make_plan, map_channels, masked
from netslim.train import ModelConfig, build_model

RATIOS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def trained_looking(name: str, width: float) -> nn.Module:
    """The network with random scales, shifts and statistics, so that no channel is like another."""
    model = build_model(ModelConfig(name=name, width=width), num_classes=10, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1, 1, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def assert_exact_at_every_ratio(name: str, width: float, coupling: Coupling = "group") -> float:
    """Check the cut at all ratios; returns the largest difference, float32, relative to the largest logit."""
    model = trained_looking(name, width)
    example = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    channels = map_channels(model, example)
    gammas = channels.named_gammas(model, coupling)
    total = sum(gamma.numel() for gamma in gammas.values())
    assert total == sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    worst = 0.0
    for ratio in RATIOS:
        plan = make_plan(gammas, channels, ratio=ratio, coupling=coupling)
        small = cut(model, plan)
        left = [module.num_features for module in small.modules() if isinstance(module, nn.BatchNorm2d)]
        assert total - sum(left) == math.floor(Fraction(str(ratio)) * total)
        assert min(left) >= 1
        with torch.no_grad():
            expected, logits = masked(model, plan)(example), small(example)
        difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        assert difference <= 1e-5, (ratio, difference)
        worst = max(worst, difference)
        if ratio == 0:
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in small.state_dict().items())
    return worst


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_cut_equals_masked_and_exactly_the_share_is_gone(name: str) -> None:
    assert_exact_at_every_ratio(name, width=0.25)


@pytest.mark.parametrize("name", ["preresnet20", "densenet40"])
def test_coupled_networks_lose_exactly_the_share_gamma_by_gamma(name: str) -> None:
    assert_exact_at_every_ratio(name, width=0.5, coupling="select")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_of_full_width_cut_equals_masked_and_exactly_the_share_is_gone(name: str) -> None:
    print(name, assert_exact_at_every_ratio(name, width=1.0))
