"""Weights of a file as a network's start: what is read, what is refused, and that a run is of one file."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_launch_cli import Netslim, assert_one_line, smallest
from torch import Tensor, nn

from netslim.launch.cli import dispatch
from netslim.launch.config import differences, fixed_fields, to_dict
from netslim.launch.presets import digits
from netslim.launch.reading import from_dict, parse
from netslim.launch.run import check_network
from netslim.train import ModelConfig, build_model, check_model
from netslim.train.models import initialise

SMALL = {"name": "vgg11", "width": 0.0625}
State = dict[str, Tensor]


def trained(num_classes: int = 10) -> State:
    """The weights of a network with gammas of its own."""
    model = build_model(ModelConfig(**SMALL), num_classes, seed=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, generator=torch.Generator().manual_seed(2))
    return model.state_dict()


def written(directory: Path, state: Any, name: str = "start.safetensors") -> Path:
    path = directory / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def started(path: Path, num_classes: int = 10, **values: Any) -> tuple[State, str]:
    """The weights of a network that starts from a file, and what is said of it."""
    lines: list[str] = []
    model = build_model(ModelConfig(weights=path, **SMALL, **values), num_classes, 0, lines.append)
    (line,) = lines
    return model.state_dict(), line


def assert_equal(have: State, want: State) -> None:
    assert have.keys() == want.keys()
    assert [name for name in want if not torch.equal(have[name], want[name])] == []


WRAPPED: dict[str, tuple[str, Callable[[State], Any]]] = {
    "safetensors": ("start.safetensors", lambda state: state),
    "a state dict": ("start.pth", OrderedDict),
    "under state_dict": ("start.pt", lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}),
    "under model": ("start.pth", lambda state: {"model": state, "model_ema": {"x": torch.zeros(1)}}),
    "under model_ema": ("start.bin", lambda state: {"model_ema": state}),
    "of DDP": ("start.pth", lambda state: {f"module.{name}": value for name, value in state.items()}),
    "compiled": ("start.safetensors", lambda state: {f"_orig_mod.{name}": value for name, value in state.items()}),
    "both": ("start.pth", lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()}),
    "both, turned": ("start.pth", lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_network_starts_from_the_weights_of_a_file_and_keeps_its_gammas(name: str, tmp_path: Path) -> None:
    file, wrap = WRAPPED[name]
    state = trained()
    have, line = started(written(tmp_path, wrap(state), file))
    assert_equal(have, state)
    key = name.removeprefix("under ") if name.startswith("under") else None
    assert line == f"weights of {tmp_path / file}: {len(state)} tensors" + f" under {key!r}" * bool(key)


def test_a_networks_own_names_keep_a_beginning_like_a_wrappers(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "wrapped.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.module = nn.Linear(2, num_classes)\n"
        "def build(num_classes=10): return Net(num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(name="wrapped:build")
    state = build_model(config, 10, seed=1).state_dict()
    again = build_model(ModelConfig(name="wrapped:build", weights=written(tmp_path, state)), 10, seed=0)
    assert_equal(again.state_dict(), state)


def test_files_of_old_torch_without_counts_of_batches_fit(tmp_path: Path) -> None:
    state = trained()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert_equal(started(written(tmp_path, old))[0], state)


def test_gammas_start_elsewhere_only_where_that_was_given(tmp_path: Path) -> None:
    path = written(tmp_path, trained())
    model = build_model(ModelConfig(weights=path, initial_gamma=0.5, **SMALL), 10, 0)
    assert all((each.weight == 0.5).all() for each in model.modules() if isinstance(each, nn.BatchNorm2d))
    assert started(path, initial_gamma=0.5)[1].endswith(
        "; every gamma starts from model.initial_gamma 0.5 all the same"
    )
    assert_equal(started(path, initial_gamma=None)[0], trained())


def test_another_classifier_is_refused_with_the_remedy_and_starts_anew_where_that_is_given(tmp_path: Path) -> None:
    path = written(tmp_path, trained(num_classes=7))
    shapes = r"2 of another shape \(classifier.weight \(7, 32\) instead of \(10, 32\), classifier.bias"
    with pytest.raises(ValueError, match=rf"start.safetensors is of another network: {shapes}.*weights-head new$"):
        started(path)
    have, line = started(path, weights_head="new")
    assert line.endswith("; classifier stays newly initialised, for 10 classes")
    want = trained(num_classes=7)
    fresh = build_model(ModelConfig(**SMALL), 10, seed=0).state_dict()
    want |= {name: fresh[name] for name in ("classifier.weight", "classifier.bias")}
    assert_equal(have, want)


def test_a_file_without_a_classifier_needs_a_new_one_too(tmp_path: Path) -> None:
    path = written(tmp_path, {name: value for name, value in trained().items() if "classifier" not in name})
    with pytest.raises(ValueError, match=r"2 missing \(classifier.weight, classifier.bias\); .*weights-head new$"):
        started(path)
    assert "classifier stays newly initialised" in started(path, weights_head="new")[1]


def test_a_classifier_by_convolution_is_one_too(tmp_path: Path) -> None:
    config = ModelConfig(name="squeezenet1_1", weights_head="new", weights=tmp_path / "start.pth")
    written(tmp_path, build_model(config.anew, 7, seed=1).state_dict(), "start.pth")
    lines: list[str] = []
    build_model(config, 10, 0, lines.append)
    assert lines[0].endswith("; classifier.1 stays newly initialised, for 10 classes")


@pytest.mark.parametrize("head", ["keep", "new"])
def test_weights_of_another_network_are_refused_by_name_and_shape_whatever_the_classifier(
    head: Any, tmp_path: Path
) -> None:
    wider = build_model(ModelConfig(name="vgg11", width=0.125), 7, seed=0).state_dict()
    path = written(tmp_path, {**wider, "more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"start.safetensors is of another network: 1 unexpected \(more\)") as caught:
        started(path, weights_head=head)
    assert "of another shape (features.0.weight (8, 3, 3, 3) instead of (4, 3, 3, 3), " in str(caught.value)
    assert ", ...)" in str(caught.value)
    assert "weights-head" not in str(caught.value)
    assert "\n" not in str(caught.value)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"no such thing", "a.safetensors cannot be read as tensors alone: SafetensorError"),
        ("a.pth", b"", "a.pth cannot be read as tensors alone: EOFError"),
        ("a.pt", b"PK\3\4 half a file", "a.pt cannot be read as tensors alone: RuntimeError"),
        ("a.pth", Malicious(), "a.pth cannot be read as tensors alone: it holds .*mkdir"),
        ("a.pth", {"state_dict": trained(), "args": Path("x")}, "it holds pathlib"),
        ("a.pth", [torch.zeros(1)], "a.pth holds no tensors by name, neither itself nor under state_dict, model, "),
        ("a.bin", {"epoch": 3}, "a.bin holds no tensors by name"),
    ],
)
def test_a_file_that_holds_more_or_less_than_tensors_is_refused_and_never_run(
    name: str, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        started(path)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_a_file_that_is_not_there_or_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.weights a.npz is none of .safetensors, .pth, .pt, .bin"):
        ModelConfig(weights=Path("a.npz"))
    with pytest.raises(ValueError, match=r"are of model.weights, which is None"):
        ModelConfig(weights_head="new")
    with pytest.raises(FileNotFoundError, match=r"model.weights nowhere.pth: there is no such file"):
        check_model(ModelConfig(weights=Path("nowhere.pth")))


def resolve(*flags: object) -> Any:
    small = ("--model.width", "0.0625", *map(str, flags))
    return parse("netslim", "", digits(), small)


def test_the_weights_are_checked_before_a_run_begins_and_the_classifier_where_classes_are_known(tmp_path: Path) -> None:
    path = written(tmp_path, trained(num_classes=7))
    with pytest.raises(ValueError, match="weights-head new"):
        check_network(resolve("--model.weights", path))
    check_network(resolve("--model.weights", path, "--model.weights-head", "new"))
    check_network(resolve("--model.weights", path, "--data.source", "cifar10", "--data.cache", tmp_path))
    with pytest.raises(ValueError, match="is of another network"):
        check_network(resolve("--model.weights", path, "--model.width", 0.125))


def test_a_run_is_of_the_file_that_it_began_with_wherever_that_lies(tmp_path: Path) -> None:
    path = written(tmp_path, trained())
    config = resolve("--model.weights", path)
    assert from_dict(json.loads(json.dumps(to_dict(config))), "config.json") == config
    moved = resolve("--model.weights", path.rename(tmp_path / "moved.safetensors"))
    assert differences(to_dict(config), to_dict(moved)) == []
    other = resolve("--model.weights", written(tmp_path, build_model(ModelConfig(**SMALL), 10, 0).state_dict()))
    (line,) = differences(to_dict(config), to_dict(other))
    assert line.startswith("model.weights_sha256 was ")
    with pytest.raises(ValueError, match=r"start.safetensors has the sha256 .* bring that file back"):
        check_network(config)


def test_a_run_of_before_there_were_weights_is_the_same_run(tmp_path: Path) -> None:
    config = to_dict(resolve())
    old = {**config, "model": {"name": "vgg11", "width": 0.0625, "initial_gamma": 0.5}}
    read = from_dict(old, "config.json")
    assert read.model.first_gamma == 0.5
    assert differences(to_dict(read), config) == []
    fields = {name for name in fixed_fields(config) if name.startswith("model.")}
    assert fields - {"model.weights_sha256"} == {"model.name", "model.width", "model.initial_gamma"}
    assert fixed_fields(config)["model.weights_sha256"] is None  # as of a field that a checkpoint does not have
    path = written(tmp_path, trained())
    assert resolve("--model.weights", path).model.first_gamma is None
    assert resolve("--model.weights", path, "--model.initial-gamma", 0.5).model.first_gamma == 0.5


def test_a_start_from_scratch_takes_nothing_of_the_file(tmp_path: Path) -> None:
    config = ModelConfig(weights=written(tmp_path, trained()), **SMALL)
    model, want = build_model(config, 10, seed=0), build_model(config.anew, 10, seed=5)
    initialise(model, config, seed=3)
    initialise(want, config.anew, seed=3)
    names = dict(want.named_parameters())
    assert [name for name, value in model.named_parameters() if not torch.equal(value, names[name])] == []


def test_a_run_starts_from_the_file_says_so_once_and_goes_on_from_no_other(
    tmp_path: Path, netslim: Netslim, data_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, other = written(tmp_path, trained()), written(tmp_path, trained(), "other.pth")
    flags = [*smallest(tmp_path / "run", data_cache), "--sparsify.lr", 1e-9, "--sparsity.weight", 0]
    assert dispatch([str(flag) for flag in ("sparsify", *flags, "--model.weights", path)]) == 0
    assert capfd.readouterr().out.count(f"weights of {path}: {len(trained())} tensors; ") == 1
    sparse = load_file(tmp_path / "run" / "sparse" / "weights.safetensors")
    assert torch.allclose(sparse["features.1.weight"], trained()["features.1.weight"], atol=1e-6)
    code, error = netslim("prune", *flags, "--model.weights", other)
    assert code == 2
    assert_one_line(error, "was made with another configuration: model.weights_sha256 was")
