"""A user's own network, named as module:function: how it is built, and how every mistake in it is said."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from netslim.launch.cli import dispatch
from netslim.launch.mistakes import guarded
from netslim.launch.presets import digits
from netslim.launch.reading import parse
from netslim.train import EngineConfig, ModelConfig, build_model, check_model, check_values
from netslim.train.models import initialise

MODULE = """
import torch
from torch import nn

def build(num_classes=10):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(num_classes))

def raises(num_classes=10):
    raise KeyError("no\\nweights")

def quits(num_classes=10):
    raise SystemExit(0)

def takes_depth(depth, num_classes=10):
    return build(num_classes)

def takes_nothing():
    return build()

def any_keyword(**options):
    return build(**options)

def a_number(num_classes=10):
    return num_classes

def flat(num_classes=10):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))

def trained(num_classes=10):
    model = build(num_classes)
    nn.init.constant_(model[1].weight, 2.0)
    return model

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.factor

def scaled(num_classes=10):
    return nn.Sequential(nn.Conv2d(3, 4, 3), Scale(), nn.Flatten(), nn.Linear(144, num_classes))

constant = 3
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in the current directory, which is not on the module path, as for a console script."""
    (tmp_path / "ownpkg").mkdir()
    (tmp_path / "ownpkg" / "nets.py").write_text(MODULE)
    (tmp_path / "ownpkg" / "broken.py").write_text("def build(:\n")
    (tmp_path / "ownpkg" / "needy.py").write_text("import no_such_dependency\n")
    (tmp_path / "ownpkg" / "quits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name in [name for name in sys.modules if name.split(".")[0] == "ownpkg"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("function", ["build", "any_keyword"])
def test_a_users_function_in_the_current_directory_builds_the_network(function: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"ownpkg.nets:{function}"), num_classes=7, seed=0)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert (model[1].weight == 0.5).all()


def test_gammas_of_a_users_own_are_said_to_be_overwritten_unless_that_is_asked_for() -> None:
    said: list[str] = []
    name = "ownpkg.nets:trained"
    model = build_model(ModelConfig(name=name), 10, 0, said.append)
    assert (model[1].weight == 0.5).all()
    (line,) = said
    assert f"the gammas of 1 of 1 BatchNorms, to which {name} gave others than 1, to 0.5" in line
    for asked, gamma in ((0.5, 0.5), (None, 2.0)):
        model = build_model(ModelConfig(name=name, initial_gamma=asked), 10, 0, said.append)
        assert (model[1].weight == gamma).all()
    build_model(ModelConfig(name="ownpkg.nets:build"), 10, 0, said.append)
    assert said == [line]


def test_what_a_start_from_scratch_cannot_make_anew_is_named() -> None:
    config = ModelConfig(name="ownpkg.nets:scaled")
    model = build_model(config, 10, seed=0)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3.0)
    assert initialise(model, config, seed=0) == ["1.factor"]
    assert [name for name, value in model.named_parameters() if (value == 3).any()] == ["1.factor"]


def test_its_weights_are_a_function_of_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)
        model = build_model(ModelConfig(name="ownpkg.nets:build", initial_gamma=None), 10, seed)
        assert isinstance(model, nn.Sequential)
        return model[0].weight

    state = torch.get_rng_state()
    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))
    torch.set_rng_state(state)
    want = torch.rand(2)
    torch.set_rng_state(state)
    check_model(ModelConfig(name="ownpkg.nets:build"))
    assert torch.equal(torch.rand(2), want)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nowhere.nets:build", ["nowhere.nets:build: no module 'nowhere' in", "or installed"]),
        ("ownpkg.missing:build", ["ownpkg.missing:build: no module 'ownpkg.missing' in"]),
        ("ownpkg.nets:missing", ["ownpkg.nets:missing: there is no 'missing' in", "nets.py"]),
        ("ownpkg.nets:constant", ["ownpkg.nets:constant is int, not a function"]),
        ("ownpkg.broken:build", ["ownpkg.broken:build: importing ownpkg.broken raised SyntaxError"]),
        ("ownpkg.needy:build", ["importing ownpkg.needy raised ModuleNotFoundError", "'no_such_dependency'"]),
        ("ownpkg.quits:build", ["importing ownpkg.quits raised SystemExit: 3"]),
        ("ownpkg.nets:takes_depth", ["is called with num_classes=... alone", "'depth'"]),
        ("ownpkg.nets:takes_nothing", ["is called with num_classes=... alone", "'num_classes'"]),
        ("ownpkg.nets:raises", ["ownpkg.nets:raises(num_classes=10) raised KeyError"]),
        ("ownpkg.nets:quits", ["ownpkg.nets:quits(num_classes=10) raised SystemExit"]),
        ("ownpkg.nets:a_number", ["ownpkg.nets:a_number returned int, not a torch.nn.Module"]),
        ("ownpkg.nets:", ["names no function; write module:function"]),
        ("ownpkg/nets.py:build", ["names no function; write module:function"]),
        ("code:interact", ["code is a module of Python's own; give yours another name"]),
    ],
)
def test_a_function_that_does_not_work_ends_the_command_in_one_line_before_any_work(
    name: str, parts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(Path().rglob("*"))
    capfd.readouterr()
    code = guarded(lambda: dispatch(["run", "digits", "--model", name, "--num-processes", "1"]))
    printed, error = capfd.readouterr()
    assert (code, printed) == (2, "")
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error
    assert {path for path in Path().rglob("*") if "__pycache__" not in path.parts} == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num-processes", "2", "--data.batch-size", "2"], ["(batch 2 over 2 processes)", "--data.batch-size 4"]),
        (["--num-processes", "1", "--data.batch-size", "1"], ["(batch 1)", "--data.batch-size 2"]),
        (
            ["--num-processes", "2", "--data.batch-size", "4", "--engine.accumulation", "2"],
            ["(batch 4 over 2 processes in 2 accumulation steps)", "--data.batch-size 8"],
        ),
    ],
)
def test_a_batch_that_leaves_a_batchnorm_one_value_for_each_channel_is_refused_before_any_work(
    flags: list[str], parts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    code = guarded(lambda: dispatch(["run", "digits", "--model", "ownpkg.nets:flat", "--run-dir", "run", *flags]))
    printed, error = capfd.readouterr()
    assert (code, printed) == (2, "")
    assert error.count("\n") == 1, error
    for part in ("BatchNorm '6' would normalise by one image", *parts):
        assert part in error
    assert not Path("run").exists()


def test_a_single_image_is_enough_where_every_batchnorm_sees_several_places_or_is_frozen() -> None:
    places, alone = (build_model(ModelConfig(name=f"ownpkg.nets:{name}"), 10, 0) for name in ("build", "flat"))
    image, state = torch.zeros(1, 3, 8, 8), torch.get_rng_state()
    for model in (places, alone):
        model.eval()[1].train()
        before = [module.training for module in model.modules()], model[1].running_mean.clone()
        if model is alone:
            check_values(model, image, 2, 2, EngineConfig(batch_norm="frozen"))
            check_values(model, image, 4, 2, EngineConfig())
            with pytest.raises(ValueError, match=r"use at least --data\.batch-size 4"):
                check_values(model, image, 2, 2, EngineConfig())
        else:
            check_values(model, image, 2, 2, EngineConfig())
        assert [module.training for module in model.modules()] == before[0]
        assert torch.equal(model[1].running_mean, before[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_width_for_a_users_network_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"model.width 0.25 is only for .*; ownpkg.nets:build needs model.width 1"):
        check_model(ModelConfig(name="ownpkg.nets:build", width=0.25))


def test_model_is_short_for_its_name_and_its_own_width() -> None:
    def model(*flags: str) -> ModelConfig:
        return parse("netslim", "", digits(), flags).model

    assert model("--model", "a.b:c") == model("--model=a.b:c") == ModelConfig(name="a.b:c", width=1)
    assert model("--model.width", "0.5", "--model", "vgg16") == ModelConfig(name="vgg16", width=0.5)
    assert model("--model.name", "vgg16") == ModelConfig(name="vgg16", width=digits().model.width)
