"""Networks by name."""

import pytest
import torch
from torch import nn

from netslim.train import ModelConfig, build_model


@pytest.mark.parametrize(
    ("name", "millions"),
    # as the reference implementations report them (VGG-19, PreResNet-164, DenseNet-40), for 10 classes
    [("vgg19", 20.04), ("preresnet164", 1.70), ("densenet40", 1.06)],
)
def test_parameters_are_those_of_the_published_networks(name: str, millions: float) -> None:
    model = build_model(ModelConfig(name=name), num_classes=10, seed=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.015)


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19", "preresnet20", "densenet40", "resnet18"])
def test_logits_have_one_column_per_class(name: str) -> None:
    width = 1.0 if name == "resnet18" else 0.25
    model = build_model(ModelConfig(name=name, width=width), num_classes=7, seed=0).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_the_weights_are_a_function_of_the_seed_alone() -> None:
    config = ModelConfig(name="vgg11", width=0.125)
    first = build_model(config, 10, seed=5).state_dict()
    torch.rand(3)
    second = build_model(config, 10, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["classifier.weight"], build_model(config, 10, seed=6).state_dict()["classifier.weight"]
    )


def test_every_scale_starts_from_the_initial_gamma() -> None:
    model = build_model(ModelConfig(name="resnet18", initial_gamma=0.5), 10, seed=0)
    scales = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((scale == 0.5).all() for scale in scales)


def test_an_unknown_model_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no model is called 'vgg91'; the nearest are .*vgg19"):
        build_model(ModelConfig(name="vgg91"), 10, seed=0)


def test_a_width_for_a_torchvision_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.width 0.5 is only for"):
        build_model(ModelConfig(name="resnet18", width=0.5), 10, seed=0)
