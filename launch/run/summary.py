"""What a stage says of itself at its end: figures that compare between stages and runs, and what it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netslim.data import DataConfig, DataInfo
from netslim.launch.run.directory import METRICS
from netslim.prune import Plan, latency
from netslim.train.record import Artefact, Picture

_LATENCY_SECONDS = 0.1
"""To measure for, per batch size."""
_PATIENCE = 2.0
"""Seconds that all calls with a large batch may take on a CPU; else its latency is not measured."""
_FILES = ("weights.safetensors", "plan.json", "config.json", METRICS)


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as one level of dotted names, ``prune.ratio``, in alphabetical order."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value) if isinstance(value, Mapping) else None
        found |= {name: value} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return dict(sorted(found.items()))


def latencies(model: nn.Module, image: torch.Tensor) -> dict[str, float | None]:
    """The median time of a batch of 1 and of 64 images, in milliseconds; image (1, 3, height, width) on a device.

    None where a slow network would keep the other ranks waiting.
    """
    (single,) = latency(model, image, (1,), _LATENCY_SECONDS).values()
    is_slow = image.device.type == "cpu" and 4 * 64 * single / 1000 > _PATIENCE
    large = None if is_slow else latency(model, image, (64,), _LATENCY_SECONDS)[64]
    return {"latency_ms_1": single, "latency_ms_64": large}


def done_line(metrics: Mapping[str, Any]) -> str:
    """How a stage ended, for people."""
    return (
        f"done in {metrics['seconds']:.1f} s: accuracy {metrics['accuracy']:.4f}, {metrics['params']:,} parameters, "
        f"{metrics['macs']:,} MACs, {metrics['file_mb']:.3f} MB"
    )


def accuracies(rows: Sequence[Mapping[str, Any]], ratio: float) -> dict[str, float | None]:
    """What the stages of a ratio came to so far, ``accuracy_cut`` and so on; rows as in results.json.

    ``accuracy_sparse`` is that of the first sparsity training, from which every ratio starts.
    """
    wanted = [row for row in rows if row["ratio"] == (0 if row["stage"] == "sparse" else ratio)]
    return {f"accuracy_{row['stage']}": row["accuracy"] for row in wanted}


def channel_rows(plan: Plan) -> list[dict[str, Any]]:
    """How many channels the plan leaves of each BatchNorm."""
    return [
        {"layer": layer.name, "channels": layer.width, "kept": len(layer.kept), "share": len(layer.kept) / layer.width}
        for layer in plan.layers
    ]


def picture_cut(rows: Sequence[dict[str, Any]], gammas: Sequence[torch.Tensor], plan: Plan) -> dict[str, Picture]:
    """What a cut leaves of each layer, and where its threshold lies among the scales of the sparse network."""

    def channels() -> bytes:
        from netslim.launch.pictures import draw_channels  # here: matplotlib is imported only to draw

        return draw_channels(rows)

    def density() -> bytes:
        from netslim.launch.pictures import draw_density

        every = torch.cat([gamma.detach().abs().float().cpu() for gamma in gammas])
        return draw_density(every, plan.threshold if plan.rules.score == "gamma" else None)

    return {"channels_by_layer": channels, "gamma_density": density}


def dataset(config: DataConfig, info: DataInfo) -> Artefact:
    """The images: not themselves, but where they come from, and what was written of them."""
    side_file = None if info.directory is None else info.directory / "info.json"
    about = {
        "source": config.source,
        **asdict(config.reading),  # size, fit, upright, white
        "num_classes": len(info.classes),
        "num_train": info.num_train,
        "num_test": info.num_test,
    }
    return Artefact(
        name=f"dataset-{config.source}",
        kind="dataset",
        files=() if side_file is None else (side_file,),  # which holds the sha256 of every .beton
        about=about,
    )


def stage_artefact(directory: Path, run_name: str) -> Artefact:
    """The files that a finished stage left."""
    files = tuple(path for path in (directory / name for name in _FILES) if path.is_file())
    return Artefact(name=f"{run_name}-{directory.name}", kind="model", files=files, about={"stage": directory.name})
