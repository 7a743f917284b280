"""The command ``netslim export``: a model of a run as a file, and what it saves against the network it came from."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from netslim.data import prepared
from netslim.launch.help import known_runs
from netslim.launch.mistakes import naming
from netslim.launch.reading import read_flags
from netslim.launch.run import INPUT, METRICS, SPARSE, config_of_run, is_complete, read_json, read_row
from netslim.launch.tables import aligned
from netslim.prune import (
    Format,
    Normalise,
    Origin,
    Plan,
    cost,
    export,
    folded,
    latency,
    load,
    load_origin,
    load_plan,
)
from netslim.train import build_model

BATCH_SIZES = (1, 64)
_NAMES = {"onnx": "model.onnx", "pt2": "model.pt2", "weights": "export"}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ExportConfig:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run directory, as runs/digits, or one of its stages, as runs/digits/finetune-0.50."""
    format: Format
    """onnx: for ONNX runtimes; pt2: for torch.export.load; weights: a directory for netslim.prune.load."""
    ratio: float | None = None
    """Which of the run's models, where it has several; 0 is the sparse one, before any cut."""
    normalise: Literal["outside", "inside"] = "outside"
    """outside: the file takes images less mean, over std, as its JSON says; inside: it takes pixels in [0, 1]."""
    pixels: Literal["float32", "uint8"] = "float32"
    """What an image is where the file normalises inside: uint8 is in [0, 255]."""
    output: Path | None = None
    """Where to write; None is beside the weights: model.onnx, model.pt2, or the directory export."""


@plain_dataclass(frozen=True)
class Slimmed:
    """What a stage left: its network with its plan, the dense network of the run, and images of their size."""

    small: nn.Module
    plan: Plan | None
    """None: nothing was cut."""
    origin: Origin
    dense: nn.Module
    images: Tensor


def export_run(arguments: Sequence[str], description: str) -> int:
    """Export one model of a run; prints where to, how far it is from torch, and a table of what it costs."""
    config = read_flags(ExportConfig, arguments or ["--help"], prog="netslim export", description=description)
    if config.pixels == "uint8" and config.normalise == "outside":
        raise ValueError("--pixels uint8 needs --normalise inside: what has been normalised is float32")
    if config.format == "weights" and config.normalise == "inside":
        raise ValueError("--normalise inside is for onnx and pt2: weights are of the network alone")
    stage = find_stage(config.run, config.ratio)
    slimmed = read_slimmed(stage)
    about = read_about(stage, slimmed, config)
    if config.normalise == "inside":
        slimmed = normalising(slimmed, about, is_bytes=config.pixels == "uint8")
    path = config.output or stage / _NAMES[config.format]
    plan, origin = slimmed.plan, slimmed.origin
    with naming("--output", path.absolute().parent):
        difference = export(slimmed.small, slimmed.images, path, config.format, plan, origin=origin, about=about)
    made = about["stage"]
    note = "" if made == "finetuned" else f", {made} and not fine-tuned"
    print(f"{path}{note}: within {difference:.1e} of torch's outputs", flush=True)
    print(_input_line(about), flush=True)
    print(aligned(table(slimmed, path, config.format)))
    return 0


def read_about(stage: Path, slimmed: Slimmed, config: ExportConfig) -> dict[str, Any]:
    """What a user of the file should know: what it takes, what it tells apart, and where it comes from."""
    row, known = read_row(stage / METRICS), _known_input(stage)
    channels, size = slimmed.images.shape[1:3]
    inside = config.normalise == "inside"
    return {
        "classes": known.get("classes"),
        "input": {
            "shape": ["batch", channels, size, size],
            "type": config.pixels if inside else "float32",
            **{key: known.get(key) for key in ("fit", "upright", "white")},
            "pixels": "in [0, 255]" if config.pixels == "uint8" else "in [0, 1]",
            "normalise": config.normalise,
            "mean": known.get("mean"),
            "std": known.get("std"),
        },
        "stage": row.stage,
        "ratio": row.ratio,
        "accuracy": row.accuracy,
        "plan": None if slimmed.plan is None else slimmed.plan.digest,
        "netslim": version("netslim"),
    }


def _known_input(stage: Path) -> dict[str, Any]:
    """What a stage says of its images; of one by an older netslim, what the prepared images still say."""
    if (stage / INPUT).is_file():
        return read_json(stage / INPUT)
    info = prepared(config_of_run(stage).data)
    return {} if info is None else {"classes": info.classes, "mean": info.mean, "std": info.std}


def _input_line(about: Mapping[str, Any]) -> str:
    taken, classes = about["input"], about["classes"] or ()
    if taken["mean"] is None:
        return "the run does not say how its images were normalised, nor do prepared images: the file does not either"
    mean, std = (", ".join(f"{each:.4f}" for each in taken[key]) for key in ("mean", "std"))
    what = f"less mean ({mean}), over std ({std})"
    how = f"as they are; {what} inside" if taken["normalise"] == "inside" else what
    shape = "x".join(map(str, taken["shape"][1:]))
    return f"takes {taken['type']} images {shape}, {taken['pixels']} {how}; tells {len(classes)} classes apart"


def normalising(slimmed: Slimmed, about: Mapping[str, Any], *, is_bytes: bool) -> Slimmed:
    """Put the statistics of the images into both networks; ValueError where nobody knows them."""
    mean, std = about["input"]["mean"], about["input"]["std"]
    if mean is None:
        raise ValueError("--normalise inside needs mean and std, which this run does not say; train it again")
    small, dense = (Normalise(each, mean, std, is_bytes=is_bytes).eval() for each in (slimmed.small, slimmed.dense))
    return replace(slimmed, small=small, dense=dense, images=small.pixels_of(slimmed.images))


def find_stage(run: Path, ratio: float | None) -> Path:
    """The stage that is meant: the run's last model of the ratio (fine-tuned, repaired or pruned), or the stage itself.

    The ratio 0 is the sparse model's.

    Raises FileNotFoundError where none is finished, and ValueError for a ratio that it lacks or that must be named.
    """
    if not run.is_dir():
        raise FileNotFoundError(
            f"there is no run at {run}; name a run directory, as runs/digits, or a stage in it; {known_runs(run)}"
        )
    if ratio == 0 and is_complete(SPARSE.directory(run)):
        return SPARSE.directory(run)
    stages = _finished(run)
    if not stages:
        raise FileNotFoundError(f"{run} holds no finished slim model; run `{_command(run)}` first")
    have = ", ".join(str(have) for have in stages)
    if ratio is None and len(stages) > 1:
        raise ValueError(f"{run} holds models of the ratios {have}; name one: --ratio {next(iter(stages))}")
    if ratio is not None and ratio not in stages:
        raise ValueError(f"{run} holds no model of the ratio {ratio}; it has {have}")
    return stages[next(iter(stages)) if ratio is None else ratio]


def _finished(run: Path) -> dict[float, Path]:
    """The stage to export for each ratio."""
    order = ("prune", "repair", "scratch", "finetune-cut", "finetune")  # of one ratio the last counts
    found = [path.parent for stage in order for path in sorted(run.glob(f"{stage}-[0-9]*/{METRICS}"))]
    found = [stage for stage in found if "-pass-" not in stage.name]
    return {read_row(stage / METRICS).ratio: stage for stage in ([run] if is_complete(run) else found)}


def _command(run: Path) -> str:
    """What would make the models of a run, or of the run that a stage belongs to."""
    for directory in (run, run.absolute().parent):
        path = directory / "config.json"
        preset = read_json(path).get("preset") if path.is_file() else None
        if preset:
            return f"netslim run {preset} --run-dir {directory}"
    return "netslim run PRESET"


def read_slimmed(stage: Path) -> Slimmed:
    """Read a stage's network, and the dense one as the run trained it, or newly built where that is gone.

    Raises ValueError for a stage that does not say how its network is built, and for files that are damaged.
    """
    plan, origin, config = load_plan(stage), load_origin(stage), config_of_run(stage)
    if origin is None:
        raise ValueError(
            f"{stage} does not say how its network is built: an older netslim made it; name one of the run's prune-, "
            "repair- or finetune- directories"
        )
    build = partial(build_model, config.model.anew, origin.num_classes, config.seed)
    sparse = SPARSE.directory(stage.absolute().parent)
    size = config.data.size
    small = load(stage, build).eval()
    # what was not cut is the dense one
    dense = small if plan is None else (load(sparse, build) if is_complete(sparse) else build()).eval()
    return Slimmed(
        small=small,
        plan=plan,
        origin=origin,
        dense=dense,
        images=torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),
    )


def table(slimmed: Slimmed, path: Path, format: Format) -> list[list[str]]:
    """What the original and the slim network cost as they are exported: a line of names, and a line for each.

    Where nothing was cut there is no slim one.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    times = [f"{device}_{size}_ms" for device in devices for size in BATCH_SIZES]
    lines = [["network", "file_mb", "params", "macs", *times]]
    if slimmed.plan is None:
        return [
            *lines,
            ["original", f"{_bytes(path) / 1e6:.3f}", *_costs(slimmed.small, slimmed.images, devices, format)],
        ]
    with tempfile.TemporaryDirectory() as directory:
        dense = Path(directory) / path.name
        export(slimmed.dense, slimmed.images, dense, format, origin=slimmed.origin)
        for name, network, file in (("original", slimmed.dense, dense), ("slim", slimmed.small, path)):
            lines.append([name, f"{_bytes(file) / 1e6:.3f}", *_costs(network, slimmed.images, devices, format)])
    return lines


def _costs(network: nn.Module, images: Tensor, devices: Sequence[str], format: Format) -> list[str]:
    price = cost(network, images)
    network = network if format == "weights" else folded(network, images)
    times = [latency(network, images.to(device), BATCH_SIZES) for device in devices]
    return [f"{price.params:,}", f"{price.macs:,}", *(f"{time:.2f}" for each in times for time in each.values())]


def _bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
