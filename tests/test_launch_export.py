"""The command `netslim export`, on a run of a user's own network: what it writes and says, and how it refuses."""

import importlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from whole_run import STAGES

from netslim.data import DataConfig, open_source
from netslim.launch.cli import dispatch
from netslim.launch.mistakes import guarded
from netslim.prune import latency, load, load_origin, load_plan

NETS = """
from torch import nn

def build(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, num_classes),
    )
"""
READING = {"fit": "pad", "upright": False, "white": 4095.0}
Netslim = Callable[..., tuple[int, str, str]]


@pytest.fixture
def netslim(capfd: pytest.CaptureFixture[str], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Netslim:
    """Runs a command line in this process, where the user's network is; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("netslim.launch.export.latency", partial(latency, seconds=0.02))

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = guarded(lambda: dispatch([str(argument) for argument in arguments]))
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Iterator[Path]:
    """A folder with a user's package and the run of its network, made by `netslim run digits --model`."""
    directory = tmp_path_factory.mktemp("workplace")
    (directory / "exportnets").mkdir()
    (directory / "exportnets" / "nets.py").write_text(NETS)
    flags = ["--model", "exportnets.nets:build", "--num-processes", "1", "--data.cache", str(data_cache)]
    flags += ["--sparsify.epochs", "1", "--finetune.epochs", "1", "--data.batch-size", "256", "--data.size", "16"]
    flags += ["--data.fit", "pad", "--data.no-upright", "--data.white", "4095"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("ACCELERATE_USE_CPU", "1")
        assert dispatch(["run", "digits", *flags, "--record.wandb", "disabled"]) == 0
        yield directory


@pytest.fixture
def run(workplace: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(workplace / "runs" / "digits", tmp_path / "run"))


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def assert_refused(result: tuple[int, str, str], run: Path, before: set[str], *parts: str) -> None:
    code, printed, error = result
    assert (code, printed) == (2, "")
    assert error.count("\n") == 1, error
    assert error.startswith("netslim: ")
    for part in parts:
        assert part in error
    assert files(run) == before


def logits_of(path: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if path.suffix == ".pt2":
            return torch.export.load(path).module()(images)
        if path.is_dir():
            return load(path).eval()(images)
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0])


def test_every_stage_of_a_users_network_loads_from_its_directory_alone(workplace: Path) -> None:
    for stage in STAGES:
        directory = workplace / "runs" / "digits" / stage
        assert load_origin(directory).function == "exportnets.nets:build"
        assert logits_of(directory, torch.zeros(1, 3, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(("format", "name"), [("onnx", "model.onnx"), ("pt2", "model.pt2"), ("weights", "export")])
def test_the_fine_tuned_model_is_written_beside_its_weights(
    format: str, name: str, run: Path, netslim: Netslim
) -> None:
    before = files(run)
    code, printed, error = netslim("export", run, "--format", format, "--ratio", "0.9")
    assert (code, error) == (0, "")
    path = run / "finetune-0.90" / name
    new = {f"finetune-0.90/{name}"}
    inside = {f"finetune-0.90/export/{file}" for file in ("weights.safetensors", "plan.json", "about.json")}
    assert files(run) - before == new | (inside if format == "weights" else {f"finetune-0.90/{name}.json"})
    images = torch.randn(3, 3, 16, 16)
    assert (logits_of(path, images) - logits_of(run / "finetune-0.90", images)).abs().max() <= 1e-4
    first, takes, head, original, slim = printed.splitlines()
    assert first.startswith(f"{path}: within ")
    assert takes.startswith("takes float32 images 3x16x16, in [0, 1] less mean (")
    assert takes.endswith("; tells 10 classes apart")
    assert head.split()[:6] == ["network", "file_mb", "params", "macs", "cpu_1_ms", "cpu_64_ms"]
    costs = [[float(cell.replace(",", "")) for cell in line.split()[1:]] for line in (original, slim)]
    assert original.split()[0] == "original"
    assert slim.split()[0] == "slim"
    assert all(large > small > 0 for large, small in zip(costs[0][:3], costs[1][:3], strict=True))
    assert all(time > 0 for line in costs for time in line[3:])


def test_a_model_that_is_not_fine_tuned_is_exported_as_pruned_and_the_output_may_be_named(
    run: Path, netslim: Netslim, tmp_path: Path
) -> None:
    for stage in STAGES:  # without the sparse one the original is built anew for the table
        if stage != "prune-0.50":
            shutil.rmtree(run / stage)
    code, printed, _ = netslim("export", run, "--format", "pt2", "--output", tmp_path / "small.pt2")
    assert code == 0
    assert printed.startswith(f"{tmp_path / 'small.pt2'}, cut and not fine-tuned: within ")
    images = torch.randn(3, 3, 16, 16)
    assert (logits_of(tmp_path / "small.pt2", images) - logits_of(run / "prune-0.50", images)).abs().max() <= 1e-4


def test_the_sparse_model_is_exported_as_the_baseline_of_its_slim_ones(run: Path, netslim: Netslim) -> None:
    code, printed, _ = netslim("export", run, "--ratio", "0", "--format", "onnx")
    assert code == 0
    path = run / "sparse" / "model.onnx"
    assert printed.startswith(f"{path}, sparse and not fine-tuned: within ")
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["network", "original"]
    images = torch.randn(3, 3, 16, 16)
    assert (logits_of(path, images) - logits_of(run / "sparse", images)).abs().max() <= 1e-4


@pytest.mark.parametrize(("form", "pixels"), [("onnx", "uint8"), ("pt2", "float32")])
def test_a_file_that_normalises_inside_is_as_accurate_on_raw_pixels_as_the_run_was(
    form: str, pixels: str, run: Path, netslim: Netslim, data_cache: Path
) -> None:
    code, printed, _ = netslim(
        "export", run, "--ratio", "0.5", "--format", form, "--normalise", "inside", "--pixels", pixels
    )
    assert code == 0
    assert f"takes {pixels} images 3x16x16, in [0, {255 if pixels == 'uint8' else 1}] as they are; less mean" in printed
    path = run / "finetune-0.50" / f"model.{form}"
    about = json.loads(Path(f"{path}.json").read_text())
    assert about["classes"] == [str(digit) for digit in range(10)]
    source = open_source(DataConfig(source="digits", size=16))
    images, labels = zip(*(source.test[number] for number in range(len(source.test))), strict=True)
    raw = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    logits = logits_of(path, raw if pixels == "uint8" else raw / 255)
    accuracy = (logits.argmax(1) == torch.tensor(labels)).double().mean().item()
    assert accuracy == pytest.approx(json.loads((run / "finetune-0.50" / "metrics.json").read_text())["accuracy"])


def test_what_a_file_takes_and_tells_apart_is_in_its_metadata_and_beside_it(run: Path, netslim: Netslim) -> None:
    for form in ("onnx", "pt2", "weights"):
        assert netslim("export", run, "--ratio", "0.5", "--format", form)[0] == 0
    stage, extra = run / "finetune-0.50", {"about.json": ""}
    about = json.loads((stage / "export" / "about.json").read_text())
    torch.export.load(stage / "model.pt2", extra_files=extra)
    assert json.loads(extra["about.json"]) == about == json.loads((stage / "model.onnx.json").read_text())
    held = onnxruntime.InferenceSession(stage / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(held["input"]) == about["input"]
    known = json.loads((run / "sparse" / "input.json").read_text())
    assert {key: about["input"][key] for key in ("mean", "fit", "upright", "white")} == {
        "mean": known["mean"],
        **READING,
    }
    assert about["plan"] == load_plan(stage).digest


def test_of_an_older_run_the_prepared_images_say_how_they_were_normalised(run: Path, netslim: Netslim) -> None:
    known = json.loads((run / "finetune-0.50" / "input.json").read_text())
    (run / "finetune-0.50" / "input.json").unlink()
    assert netslim("export", run, "--ratio", "0.5", "--format", "weights")[0] == 0
    about = json.loads((run / "finetune-0.50" / "export" / "about.json").read_text())
    assert (about["input"]["mean"], about["classes"]) == (known["mean"], known["classes"])
    assert about["input"]["fit"] is None  # which prepared images do not say


def test_a_run_that_nobody_knows_the_statistics_of_says_so_and_normalises_nothing_inside(
    run: Path, netslim: Netslim
) -> None:
    for stage in (run / "prune-0.50", run / "prune-0.90"):
        (stage / "input.json").unlink()
    config = json.loads((run / "prune-0.50" / "config.json").read_text())
    config["data"]["cache"] = str(run / "gone")
    (run / "prune-0.50" / "config.json").write_text(json.dumps(config))
    assert_refused(
        netslim("export", run / "prune-0.50", "--format", "pt2", "--normalise", "inside"),
        run,
        files(run),
        "mean and std",
    )
    _, printed, _ = netslim("export", run / "prune-0.50", "--format", "weights")
    assert "does not say how its images were normalised" in printed


def test_a_sparse_model_of_an_older_netslim_says_that_it_cannot_be_built_alone(run: Path, netslim: Netslim) -> None:
    (run / "sparse" / "origin.json").unlink()
    result = netslim("export", run / "sparse", "--format", "onnx")
    assert_refused(result, run, files(run), "does not say how its network is built", "name one of the run's prune-")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["RUN", "--format", "onnx"], ["holds models of the ratios 0.5, 0.9; name one: --ratio 0.5"]),
        (["RUN", "--format", "onnx", "--ratio", "0.7"], ["no model of the ratio 0.7; it has 0.5, 0.9"]),
        (["RUN/prune-0.50", "--format", "onnx", "--ratio", "0.9"], ["no model of the ratio 0.9; it has 0.5"]),
        (["RUN/no", "--format", "onnx"], ["there is no run at", "name a run directory"]),
        (["RUN/sparse", "--format", "onnx", "--ratio", "0.5"], ["no model of the ratio 0.5; it has 0.0"]),
        (["RUN/sparse", "--format", "onnx", "--pixels", "uint8"], ["--pixels uint8 needs --normalise inside"]),
        (["RUN/sparse", "--format", "weights", "--normalise", "inside"], ["--normalise inside is for onnx and pt2"]),
        (["RUN/unfinished", "--format", "pt2"], ["no finished slim model; run `netslim run digits --run-dir"]),
        (["RUN", "--format", "tflite"], ["'tflite'", "'onnx', 'pt2', 'weights'"]),
        (["RUN"], ["--format"]),
        (["RUN", "--format", "pt2", "--ratoi", "0.5"], ["--ratoi"]),
        (["RUN/prune-0.50", "--format", "pt2", "--output", "/proc/self/x.pt2"], ["/proc/self"]),
        (["RUN/prune-0.50", "--format", "pt2", "--output", "no/x.pt2"], ["no directory no", "make it first"]),
        (["RUN/prune-0.50", "--format", "pt2", "--output", "RUN"], ["is a directory; name a file"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], parts: list[str], run: Path, netslim: Netslim
) -> None:
    shutil.move(run / "finetune-0.50", run / "unfinished")
    (run / "unfinished" / "metrics.json").unlink()
    before = files(run)
    assert_refused(netslim("export", *(a.replace("RUN", str(run)) for a in arguments)), run, before, *parts)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    run: Path, netslim: Netslim, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    result = netslim("export", run / "prune-0.50", "--format", "onnx")
    assert_refused(result, run, before, "needs onnxruntime: pip install onnx onnxscript onnxruntime")


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("stage", ["finetune-0.50", "sparse"])
def test_damaged_or_malicious_weights_are_refused_and_never_executed(stage: str, run: Path, netslim: Netslim) -> None:
    before = files(run)
    weights = run / stage / "weights.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:100], pickle.dumps(Malicious())):
        weights.write_bytes(content)
        result = netslim("export", run, "--format", "pt2", "--ratio", "0.5")
        assert_refused(result, run, before, f"{weights} is not a safetensors file, or is damaged")
    assert not Path("executed").exists()


def test_a_users_network_that_is_gone_is_named(
    run: Path, netslim: Netslim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "workplace" not in path])
    for name in ("exportnets", "exportnets.nets"):
        monkeypatch.delitem(sys.modules, name)
    result = netslim("export", run, "--format", "pt2", "--ratio", "0.5")
    assert_refused(result, run, before, "model exportnets.nets:build: no module 'exportnets' in", "or installed")


def test_help_names_the_command_and_its_flags(capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["--help"]) == 0
    assert "  export RUN " in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        dispatch(["export", "--help"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    for word in ("RUN", "--format", "onnx", "pt2", "weights", "--ratio", "--output"):
        assert word in text
