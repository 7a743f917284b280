"""timm's networks by name: as any other, and without a download."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prune_nets import scramble

from netslim.launch.presets import digits
from netslim.launch.reading import parse
from netslim.prune import Origin, load, save, slim
from netslim.train import ModelConfig, build_model, check_model
from netslim.train.models import is_own

pytest.importorskip("timm", reason="needs the extra: pip install '.[timm]'")
NAME = "timm:resnet10t"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("timm asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_its_weights_are_a_function_of_the_seed_alone() -> None:
    config = ModelConfig(name=NAME)
    first = build_model(config, 7, seed=5).state_dict()
    torch.rand(3)
    second = build_model(config, 7, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], build_model(config, 7, seed=6).state_dict()["fc.weight"])
    assert first["fc.weight"].shape[0] == 7
    assert (first["bn1.weight"] == 0.5).all()


def test_a_name_with_the_tag_of_its_weights_is_the_same_network() -> None:
    names = [ModelConfig(name=name, initial_gamma=None) for name in (NAME, f"{NAME}.c3_in1k")]
    first, second = (build_model(config, 10, seed=0).state_dict() for config in names)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_told_from_a_users_own_function() -> None:
    assert not is_own(NAME)
    assert is_own("timm.models:resnet18")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet10", "timm:resnet10t"),
        ("resnet10t.c3_in2k", "timm:resnet10t.c3_in1k"),
        ("", "those of timm.list_models"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"no model is called 'timm:{name}'; the nearest are .*{near}") as caught:
        check_model(ModelConfig(name=f"timm:{name}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet10t.c3_in1k", "hf_hub:a/b", "local-dir:/tmp"])
def test_a_name_that_timm_would_fetch_or_read_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="no model is called"):
        build_model(ModelConfig(name=f"timm:{name}"), 10, seed=0)


def test_a_width_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.width 0.5 is only for .*; timm:resnet10t needs model.width 1"):
        check_model(ModelConfig(name=NAME, width=0.5))


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what import takes for missing
    with pytest.raises(ValueError, match=r'timm:resnet10t needs timm \(.*\); pip install "netslim\[timm\]"'):
        check_model(ModelConfig(name=NAME))


def test_what_goes_wrong_in_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs\nanother package")

    monkeypatch.setattr("timm.create_model", create)
    with pytest.raises(ValueError, match=r"model timm:resnet10t with 10 classes raised RuntimeError: needs another"):
        build_model(ModelConfig(name=NAME), 10, seed=0)


def test_model_is_short_for_its_name() -> None:
    config = parse("netslim", "", digits(), ("--model", NAME)).model
    assert config == ModelConfig(name=NAME)


def test_a_slim_one_is_loaded_from_its_directory_alone(tmp_path: Path) -> None:
    origin = Origin(function="netslim.train.models:build_network", name=NAME, width=1.0, num_classes=10)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small, plan = slim(scramble(origin.build()).eval(), images, ratio=0.4)
    save(small, plan, tmp_path, origin)
    assert plan.num_removed > 0
    again = load(tmp_path).eval()
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(images), small(images))
