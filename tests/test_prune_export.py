"""Exported networks give torch's outputs, at any batch size, in one file, without this library."""

import copy
import errno
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from test_prune_nets import EXAMPLE, Gated, Residual, Shuffling, chain, scramble
from torch import Tensor, nn
from torchvision import models

from netslim.prune import Origin, cost, export, folded, latency, load, load_plan, save, slim
from netslim.prune.ship import formats
from netslim.train.models import build_network

NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vgg19": (lambda: build_network("vgg19", 10, width=0.125), "group"),
    "resnet50": (lambda: models.resnet50(width_per_group=16, num_classes=10), "group"),
    "densenet40": (lambda: build_network("densenet40", 10, width=0.25), "select"),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), "group"),
}


def slimmed(model: nn.Module, coupling: str = "group", example: Tensor = EXAMPLE, ratio: float = 0.4) -> nn.Module:
    small, _ = slim(scramble(model).eval(), example, ratio=ratio, coupling=coupling)
    return small


def relative(have: Tensor, want: Tensor) -> float:
    return ((have - want).abs().max() / want.abs().max().clamp(min=1)).item()


def run_file(path: Path, images: Tensor) -> Tensor:
    """Run an exported file as its reader would, without netslim."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return slimmed(chain(8, 6))


@pytest.mark.parametrize(
    ("name", "formats"),
    # an export of many layers takes seconds; the slow test has every network in both formats
    [
        ("vgg19", ("onnx", "pt2")),
        ("resnet50", ("onnx",)),
        ("densenet40", ("onnx",)),
        ("mobilenet_v3_small", ("pt2",)),
        pytest.param("mobilenet_v3_small", ("onnx",), marks=pytest.mark.slow),
    ],
)
def test_files_of_a_slim_network_agree_with_torch_at_any_batch_size(name, formats, tmp_path):
    torch.manual_seed(0)
    build, coupling = NETS[name]
    small = slimmed(build(), coupling)
    for format in formats:
        path = tmp_path / f"model.{format}"
        assert export(small, EXAMPLE, path, format) <= 1e-4
        for size in (1, 2, 5):
            images = torch.randn(size, 3, 32, 32)
            with torch.no_grad():
                assert relative(run_file(path, images), small(images)) <= 1e-4
    assert {file.name for file in tmp_path.iterdir()} == {f"model.{format}" for format in formats}


class PreActivated(nn.Module):
    """A stream that one BatchNorm reads and another writes: cut gamma by gamma, one selects and the other scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.read, self.conv = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.write, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.write(self.conv(F.relu(self.read(x))))).mean((2, 3)))


def test_a_network_with_selections_runs_where_netslim_is_not_installed(tmp_path):
    torch.manual_seed(0)
    small = slimmed(PreActivated(), "select")
    assert {type(module).__name__ for module in small.modules()} >= {"SelectChannels", "ScatterChannels"}
    for format in ("pt2", "onnx"):
        export(small, EXAMPLE, tmp_path / f"model.{format}", format)
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    program = """
import sys
sys.modules["netslim"] = None
import onnxruntime, torch
images = torch.load("images.pt")
with torch.no_grad():
    by_torch = torch.export.load("model.pt2").module()(images)
(by_onnx,) = onnxruntime.InferenceSession("model.onnx").run(None, {"images": images.numpy()})
torch.save([by_torch, torch.from_numpy(by_onnx)], "logits.pt")
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert all(relative(logits, small(images)) <= 1e-4 for logits in torch.load(tmp_path / "logits.pt"))


def test_files_have_plain_names_any_batch_and_no_trace_of_this_machine(small, tmp_path):
    for format in ("pt2", "onnx"):
        export(small, EXAMPLE, tmp_path / f"model.{format}", format)
        content = (tmp_path / f"model.{format}").read_bytes()
        assert os.fsencode(Path(__file__).parent) not in content
        assert os.fsencode(sys.prefix) not in content
        # the example, possibly someone's image, is not in the file
        assert len(content) < 4 * sum(p.numel() for p in small.parameters()) + EXAMPLE.nbytes
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_example_may_be_a_single_image_and_the_model_in_training(small, tmp_path):
    before = {key: value.clone() for key, value in small.train().state_dict().items()}
    export(small, EXAMPLE[:1], tmp_path / "model.pt2", "pt2")
    assert small.training
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    with torch.no_grad():
        assert relative(run_file(tmp_path / "model.pt2", EXAMPLE), small.eval()(EXAMPLE)) <= 1e-4


def test_weights_are_a_directory_that_load_takes_alone(tmp_path):
    origin = Origin(function="netslim.train.models:build_network", name="vgg11", width=0.125, num_classes=10)
    small, plan = slim(scramble(origin.build()).eval(), EXAMPLE, ratio=0.5)
    save(small, plan, tmp_path / "stage", origin)
    plan = load_plan(tmp_path / "stage")
    assert export(small, EXAMPLE, tmp_path / "slim", "weights", plan) == 0
    assert {file.name for file in (tmp_path / "slim").iterdir()} == {"weights.safetensors", "plan.json"}
    assert {file.name for file in tmp_path.iterdir()} == {"stage", "slim"}
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "slim").eval()(EXAMPLE), small(EXAMPLE))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_file_that_differs_from_torch_is_an_error_and_nothing_is_left(format, small, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_text("the old one")
    monkeypatch.setattr(formats, "folded", lambda model, _: scramble(copy.deepcopy(model), seed=1))
    with pytest.raises(RuntimeError, match=r"differs from torch by .*, more than 0.0001, so it was not written"):
        export(small, EXAMPLE, path, format)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert path.read_text() == "the old one"


def test_weights_that_load_as_another_network_are_an_error_and_nothing_is_left(tmp_path, monkeypatch):
    origin = Origin(function="netslim.train.models:build_network", name="vgg11", width=0.125, num_classes=10)
    small, plan = slim(scramble(origin.build()).eval(), EXAMPLE, ratio=0.5)
    save(small, plan, tmp_path / "stage", origin)
    monkeypatch.setattr(formats, "load", lambda directory: scramble(load(directory), 1))
    with pytest.raises(RuntimeError, match="differs from torch"):
        export(small, EXAMPLE, tmp_path / "slim", "weights", load_plan(tmp_path / "stage"))
    assert [file.name for file in tmp_path.iterdir()] == ["stage"]


def test_a_full_disk_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("the old one")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export(small, EXAMPLE, path, "pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "the old one"


@pytest.fixture
def no_work(monkeypatch):
    def work(*_: object) -> None:
        raise AssertionError("work was done before the arguments were checked")

    monkeypatch.setattr(formats, "folded", work)


@pytest.mark.usefixtures("no_work")
def test_wrong_arguments_are_refused_in_one_line_before_any_work(small, tmp_path):
    (tmp_path / "file").touch()
    cases = [
        (EXAMPLE, "model.tf", "tf", "there is no export format 'tf'; the formats are onnx, pt2, weights"),
        (EXAMPLE[:0], "model.pt2", "pt2", r"an example of shape \(0, 3, 32, 32\) is no batch of images"),
        (EXAMPLE.double(), "model.pt2", "pt2", "float32 networks, the example is torch.float64; use .float()"),
        (EXAMPLE, "", "onnx", "is a directory; name a file"),
        (EXAMPLE, "file", "weights", "need an origin that says how their network is built"),
        (EXAMPLE, "no/model.pt2", "pt2", "there is no directory .*/no to write model.pt2 into; make it first"),
    ]
    for example, name, format, what in cases:
        with pytest.raises((ValueError, OSError), match=what) as caught:
            export(small, example, tmp_path / name, format)
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("no_work")
def test_a_missing_package_is_named_with_the_command_that_installs_it(small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ValueError, match="needs onnxscript: pip install onnx onnxscript onnxruntime"):
        export(small, EXAMPLE, tmp_path / "model.onnx", "onnx")


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


def test_a_network_that_fixes_its_batch_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"torch.export cannot export the network: .* nor fix their number") as caught:
        export(FixedBatch(), EXAMPLE, tmp_path / "model.pt2", "pt2")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


class Twice(nn.Module):
    """One convolution before two BatchNorms, a transposed one, and one with a BatchNorm and another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.up, self.up_norm = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4, affine=False)
        self.split, self.split_norm = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)
        self.read, self.read_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.stray = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.conv(F.relu(self.a(self.conv(x)))))
        x = self.split_norm(self.split(self.up_norm(self.up(x))))
        x = self.read(x)
        return (x + self.read_norm(x) + self.stray(x)).mean((2, 3))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = chain(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if x.sum() > 0 else -self.layers(x)


@pytest.mark.parametrize(
    ("build", "before", "after"),
    [
        (lambda: chain(8, 6), 3, 0),  # a BatchNorm1d behind a linear layer too
        (Residual, 3, 0),
        (Twice, 6, 5),  # one convolution stands before two BatchNorms
        (Gated, 4, 1),  # what it normalises is also read bare
        (Shuffling, 5, 1),  # one convolution is called twice
        (Untraceable, 2, 0),
    ],
)
def test_batch_norms_are_folded_where_nothing_else_reads_before_them(build, before, after):
    torch.manual_seed(0)
    model = scramble_tracked(build()).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = folded(model, EXAMPLE)
    assert (norms(model), norms(plain)) == (before, after)
    with torch.no_grad():
        assert relative(plain(EXAMPLE), model(EXAMPLE)) <= 1e-5
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def scramble_tracked(model: nn.Module) -> nn.Module:
    """As `scramble`, for networks that also have BatchNorms without statistics or without gammas."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            scramble(module)
    return model


class Sequences(nn.Module):
    """A BatchNorm1d that normalises the steps of a sequence, not the features of the linear layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(32, 96), nn.BatchNorm1d(96)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.flatten(1, 2))).sum(1)


def test_a_fold_that_would_change_the_outputs_is_not_made():
    torch.manual_seed(0)
    model = scramble(Sequences()).eval()
    plain = folded(model, EXAMPLE)
    assert norms(plain) == 1
    with torch.no_grad():
        assert torch.equal(plain(EXAMPLE), model(EXAMPLE))


class Sleeping(nn.Module):
    """Takes 10 ms per image, and remembers its calls."""

    seen: ClassVar[list[tuple[int, bool, bool]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((len(x), self.training, torch.is_inference_mode_enabled()))
        time.sleep(0.01 * len(x))
        return x


def test_latency_is_the_median_per_batch_size_in_eval_mode_after_a_warm_up():
    Sleeping.seen.clear()
    model = Sleeping()
    times = latency(model, EXAMPLE, batch_sizes=(1, 4), seconds=0)
    assert list(times) == [1, 4]
    assert 10 <= times[1] < times[4]
    assert times[4] >= 40
    assert Sleeping.seen == [(1, False, True)] * 4 + [(4, False, True)] * 4
    assert model.training


FULL: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "vgg19": (lambda: build_network("vgg19", 10), "group", 32),
    "resnet50": (models.resnet50, "group", 224),
    "densenet40": (lambda: build_network("densenet40", 10), "select", 32),
    "mobilenet_v3_large": (models.mobilenet_v3_large, "group", 224),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_networks_of_full_size_are_exported_and_how_long_they_take(tmp_path, capsys):
    rows = []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name, (build, coupling, size) in FULL.items():
        torch.manual_seed(0)
        images = torch.randn(2, 3, size, size)
        model = scramble(build()).eval()
        small = slimmed(model, coupling, images, ratio=0.5)
        for what, network in ((name, model), ("  slim", small)):
            files = [tmp_path / f"model.{format}" for format in ("pt2", "onnx")]
            differences = [export(network, images, file, file.suffix[1:]) for file in files]
            assert max(differences) <= 1e-4
            times = [latency(folded(network, images), images.to(device)) for device in devices]
            price = cost(network, images)
            megabytes = [f"{file.stat().st_size / 1e6:.2f} MB" for file in files]
            ms = [
                f"{device} batch {n}: {t:.2f} ms"
                for device, each in zip(devices, times, strict=True)
                for n, t in each.items()
            ]
            rows.append(f"{what:<20} {max(differences):.0e}  {price.params:>11,}  {price.macs:>14,}  {megabytes}  {ms}")
    with capsys.disabled():
        print("\n" + "\n".join(rows))
