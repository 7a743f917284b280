"""What a stage shows in Weights & Biases besides its numbers: histograms, tables, pictures, and where it came from."""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Table = Sequence[Mapping[str, Any]]
"""Rows with the same keys, which name the columns."""
Picture = Callable[[], bytes]
"""Draws a PNG; called only where somebody will see it."""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What a stage made, or was made from: files that stay as they are, or without files what is said ``about`` it."""

    name: str
    kind: str
    files: tuple[Path, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """How artefacts come from one another."""

    made: Artefact
    used: tuple[Artefact, ...]


@torch.no_grad()
def gamma_histograms(model: nn.Module) -> dict[str, Any]:
    """One of |gamma| per BatchNorm."""
    import numpy
    import wandb

    return {
        f"gamma/{name}": wandb.Histogram(np_histogram=numpy.histogram(module.weight.abs().float().cpu(), bins=64))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    }


def as_table(rows: Table) -> Any:
    """W&B's table of the rows."""
    import wandb

    columns = list(rows[0]) if rows else []
    return wandb.Table(columns=[*columns], data=[[row[column] for column in columns] for row in rows])


def as_image(draw: Picture) -> Any:
    """W&B's image of the picture."""
    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(draw())))


def as_drafts(lineage: Lineage) -> tuple[list[Any], Any]:
    """W&B's artifacts, known by the content of their files: those that went into a run, and the one that came out."""
    return [_as_draft(artefact) for artefact in lineage.used], _as_draft(lineage.made)


def log_drafts(run: Any, used: Sequence[Any], made: Any) -> None:
    """Tell W&B which artifacts went into the run, and which came out of it, online and offline.

    Of what went in the server finds what an earlier stage logged, by its content, or takes it now.
    """
    for draft in used:
        # Not `run.use_artifact`: it refuses to work offline, and online it waits for the server without a limit. This
        # is what it does before it waits.
        run._log_artifact(draft, is_user_created=True, use_after_commit=True)
    run.log_artifact(made)


def _as_draft(artefact: Artefact) -> Any:
    import wandb

    # other characters are not allowed in W&B's names
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", artefact.name)
    made = wandb.Artifact(name, type=artefact.kind, metadata=dict(artefact.about))
    for path in artefact.files:
        made.add_file(str(path), policy="immutable", skip_cache=True)  # uploaded from where it lies, not from a copy
    if not artefact.files:
        with made.new_file("about.json", encoding="utf-8") as file:
            json.dump(dict(artefact.about), file, indent=2, sort_keys=True)
    return made
