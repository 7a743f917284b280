"""The command ``netslim export``: a run's slim model as a file, and what it saves against the network it came from."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from netslim.launch.reading import read_flags
from netslim.launch.run import METRICS, SPARSE, config_of_run, is_complete, read_json, read_row
from netslim.launch.tables import aligned
from netslim.prune import Format, Plan, cost, export, folded, latency, load, load_plan, save
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
    """Which of the run's models, where it has several."""
    output: Path | None = None
    """Where to write; None is beside the weights: model.onnx, model.pt2, or the directory export."""


@plain_dataclass(frozen=True)
class Slimmed:
    """What a stage left: the slim network with its plan, the dense network of the run, and images of their size."""

    small: nn.Module
    plan: Plan
    dense: nn.Module
    images: Tensor


def export_run(arguments: Sequence[str], description: str) -> int:
    """Export one model of a run; prints where to, how far it is from torch, and a table of what it costs."""
    config = read_flags(ExportConfig, arguments or ["--help"], prog="netslim export", description=description)
    stage = find_stage(config.run, config.ratio)
    slimmed = read_slimmed(stage)
    path = config.output or stage / _NAMES[config.format]
    difference = export(slimmed.small, slimmed.images, path, config.format, slimmed.plan)
    made = read_row(stage / METRICS).stage
    note = "" if made == "finetuned" else f", {made} and not fine-tuned"
    print(f"{path}{note}: within {difference:.1e} of torch's outputs", flush=True)
    print(aligned(table(slimmed, path, config.format)))
    return 0


def find_stage(run: Path, ratio: float | None) -> Path:
    """The stage that is meant: the run's last model of the ratio (fine-tuned, repaired or pruned), or the stage itself.

    Raises FileNotFoundError where none is finished, and ValueError for a ratio that it lacks or that must be named.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"there is no run at {run}; name a run directory, as runs/digits, or a stage in it")
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

    Raises ValueError for a stage without a plan, and for files that are damaged.
    """
    plan = load_plan(stage)
    if plan is None or plan.origin is None:
        lack = "no plan" if plan is None else "a plan of an older netslim"
        raise ValueError(
            f"{stage} has {lack}; name a run that `netslim run` made, or its prune-, repair- or finetune- directory"
        )
    config = config_of_run(stage)
    build = partial(build_model, config.model.anew, plan.origin.num_classes, config.seed)
    sparse = SPARSE.directory(stage.absolute().parent)
    size = config.data.size
    return Slimmed(
        small=load(stage, build).eval(),
        plan=plan,
        dense=(load(sparse, build) if is_complete(sparse) else build()).eval(),
        images=torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),
    )


def table(slimmed: Slimmed, path: Path, format: Format) -> list[list[str]]:
    """What the original and the slim network cost as they are exported: a line of names, and a line for each."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    times = [f"{device}_{size}_ms" for device in devices for size in BATCH_SIZES]
    lines = [["network", "file_mb", "params", "macs", *times]]
    with tempfile.TemporaryDirectory() as directory:
        dense = Path(directory) / path.name
        if format == "weights":
            save(slimmed.dense, None, dense)
        else:
            export(slimmed.dense, slimmed.images, dense, format)
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
