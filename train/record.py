"""What a stage leaves behind while it runs: metrics.jsonl always, Weights & Biases where wanted."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TextIO, TypeVar, cast

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RecordConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online where a key is present, else offline; it never asks and never blocks."""
    project: str = "netslim"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; None is the key's own."""
    group: str | None = None
    """W&B group that holds the stages of this experiment; None is the name of the run directory."""
    tags: tuple[str, ...] = ()
    """W&B tags."""


class Record:
    """The record of one stage, kept by rank 0; on the other ranks every method does nothing. Use it with ``with``.

    ``directory`` gets ``metrics.jsonl``, a line an epoch, flushed at once. Progress bars show on a terminal only.
    """

    def __init__(
        self,
        stage: str,
        directory: Path,
        *,
        is_main: bool,
        config: RecordConfig | None = None,
        run_name: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.stage = stage
        self.is_main = is_main
        self._shows_bars = is_main and sys.stderr.isatty()
        self._path = directory / "metrics.jsonl"
        self._file: TextIO | None = None
        self._wandb: Any = None
        if is_main:
            directory.mkdir(parents=True, exist_ok=True)
            if config is not None and config.wandb != "disabled":
                self._wandb = _start_wandb(config, stage, run_name, directory.parent, settings or {}, self.say)

    def say(self, line: str, *, warning: bool = False) -> None:
        """Print one line, from rank 0; a warning goes to stderr."""
        if self.is_main:
            stream = sys.stderr if warning else sys.stdout
            tqdm.write(f"{self.stage}: {'warning: ' if warning else ''}{line}", file=stream)
            stream.flush()

    def progress(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """The items behind a progress bar, where one shows."""
        return tqdm(items, total=total, desc=f"{self.stage} {what}", leave=False, disable=not self._shows_bars)

    def resume(self, metrics: Sequence[dict[str, Any]]) -> None:
        """Start ``metrics.jsonl`` with the epochs that an earlier process did; lines that it wrote beyond them go."""
        if self.is_main:
            self._file = self._path.open("w", encoding="utf-8")
            self._file.writelines(json.dumps(line) + "\n" for line in metrics)
            self._file.flush()

    def epoch(self, metrics: dict[str, Any], model: nn.Module) -> None:
        """Append one epoch's metrics; W&B also gets a histogram of |gamma| per BatchNorm."""
        if not self.is_main:
            return
        if self._file is None:  # of the first epoch: what an earlier attempt left is replaced
            self._file = self._path.open("w", encoding="utf-8")
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        self.say(
            f"epoch {metrics['epoch']}  loss {metrics['train_loss']:.3f}  accuracy {metrics['accuracy']:.4f}  "
            f"{metrics['images_per_second']:.0f} images/s"
        )
        if self._wandb is not None:
            self._wandb.log({**metrics, **_gamma_histograms(model)})

    def finish(self, summary: dict[str, Any]) -> None:
        """Make ``summary`` the W&B run's summary."""
        if self._wandb is not None:
            self._wandb.summary.update(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        if self._file is not None:
            # after a failed write the rest can't be written either, and the first error is the one to report
            with contextlib.suppress(*([] if kind is None else [OSError])):
                self._file.close()


def _start_wandb(
    config: RecordConfig,
    stage: str,
    run_name: str,
    directory: Path,
    settings: dict[str, Any],
    say: Callable[..., None],
) -> Any:
    import wandb  # seconds to import, and not wanted everywhere

    def start(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or run_name,
            job_type=stage.split("-")[0],
            name=f"{run_name} {stage}",
            tags=list(config.tags),
            config=settings,
            dir=directory,
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, init_timeout=30, console="off"),
        )

    mode = _wandb_mode(config, has_key=lambda: wandb.login(prompt=False))
    if mode is None:
        return None
    try:
        run = start(mode)
    except wandb.errors.Error as error:
        # The training is worth more than its live view; `wandb sync` uploads the offline record later.
        say(f"W&B could not start online ({error}); recording offline, upload later with `wandb sync`", warning=True)
        os.environ["WANDB_MODE"] = "offline"  # so that the stages after this one do not wait as well
        run = start("offline")
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    return run


def _wandb_mode(config: RecordConfig, has_key: Callable[[], bool]) -> Literal["online", "offline"] | None:
    wanted = os.environ.get("WANDB_MODE", "auto") if config.wandb == "auto" else config.wandb
    if wanted == "disabled":
        return None
    if wanted in ("online", "offline"):
        return cast(Literal["online", "offline"], wanted)
    return "online" if has_key() else "offline"


@torch.no_grad()
def _gamma_histograms(model: nn.Module) -> dict[str, Any]:
    import numpy
    import wandb

    return {
        f"gamma/{name}": wandb.Histogram(np_histogram=numpy.histogram(module.weight.abs().float().cpu(), bins=64))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    }
