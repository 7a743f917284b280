"""What a stage leaves behind while it runs: metrics.jsonl always, W&B and other trackers where wanted."""

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TextIO, TypeVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from tqdm import tqdm

from netslim.base import plainly
from netslim.train.record.pace import Leg, Pace
from netslim.train.record.tracker_run import TrackerRun
from netslim.train.record.trackers import About, TrackerName, check_trackers
from netslim.train.record.wandb_content import Lineage, Picture, Table
from netslim.train.record.wandb_run import WandbRun
from netslim.train.record.wandb_server import Trial, mode_of_environment, of_environment, wandb_mode

T = TypeVar("T")


def _tags() -> tuple[str, ...]:
    return tuple(tag for tag in map(str.strip, (of_environment("TAGS") or "").split(",")) if tag)


def _directory() -> Path | None:
    named = of_environment("DIR")
    # an agent says there where it was started itself
    return None if named is None or Trial.of_this_process() is not None else Path(named)


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RecordConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is what WANDB_MODE, `wandb offline` or `wandb disabled` say, else online where a key is
    present, else offline; without an answer, offline."""
    project: str = Field(default_factory=lambda: of_environment("PROJECT") or "netslim")
    """Project in W&B and Trackio, experiment in MLflow; WANDB_PROJECT says another default."""
    entity: str | None = Field(default_factory=lambda: of_environment("ENTITY"))
    """W&B user or team, by default that of WANDB_ENTITY; None is the key's own."""
    group: str | None = Field(default_factory=lambda: of_environment("RUN_GROUP"))
    """W&B group that holds the stages of this experiment, by default that of WANDB_RUN_GROUP; None is the name of the
    run directory."""
    name: str | None = Field(default_factory=lambda: of_environment("NAME"))
    """W&B name of this experiment, which the stage's follows, by default that of WANDB_NAME; None is the name of the
    run directory."""
    notes: str | None = Field(default_factory=lambda: of_environment("NOTES"))
    """W&B notes, by default those of WANDB_NOTES."""
    job_type: str | None = Field(default_factory=lambda: of_environment("JOB_TYPE"))
    """W&B job type, by default that of WANDB_JOB_TYPE; None is the stage: sparse, prune, repair, finetune."""
    tags: tuple[str, ...] = Field(default_factory=_tags)
    """W&B tags, by default those of WANDB_TAGS, between commas."""
    directory: Path | None = Field(default_factory=_directory)
    """Where W&B keeps its files, by default in WANDB_DIR; None is the run directory."""
    artifacts: bool = False
    """Upload each stage's files as a W&B artifact, and link it to what it was made from."""
    trackers: tuple[TrackerName, ...] = ()
    """Trackers that get the same figures and settings beside W&B, each with an extra of its name."""
    progress_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How often a long stage says how far it is, where there is no terminal for a bar."""

    def __post_init__(self) -> None:
        if self.wandb == "auto":
            mode_of_environment()  # refuses what it does not know, before anything starts
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"record.trackers names a tracker twice in {self.trackers}; name each once")

    def check_installed(self) -> None:
        """Raise ValueError, which names the extra, for a tracker that is not installed; a run does so at its start."""
        check_trackers(self.trackers)


OF_ENVIRONMENT = ("project", "entity", "group", "name", "notes", "job_type", "tags", "directory")
"""The fields of `RecordConfig` whose defaults are variables of W&B's."""


class Record:
    """The record of one stage, kept by rank 0; on the other ranks every method does nothing. Use it with ``with``.

    ``directory`` gets ``metrics.jsonl``, a line an epoch, flushed at once. Progress bars show on a terminal only, else
    there are lines. W&B and other trackers start with the first `epoch` or `finish`; what goes wrong with them is a
    warning line, and never an exception. ``settings`` are the W&B run's config. Under ``wandb agent`` the stage that
    ``is_last`` is the trial. Trackers need a `Runtime`, by which Accelerate knows the ranks.
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
        is_last: bool = False,
    ) -> None:
        config = config or RecordConfig(wandb="disabled")
        self.stage = stage
        self.is_main = is_main
        self._pace = Pace(stage, self.say, is_main=is_main, seconds=config.progress_seconds)
        self._path = directory / "metrics.jsonl"
        self._file: TextIO | None = None
        self._wandb: WandbRun | None = None
        self._trackers: list[TrackerRun] = []
        if is_main:
            directory.mkdir(parents=True, exist_ok=True)
            description = _describe(config, stage, run_name)
            if wandb_mode(config.wandb) is not None:
                run = WandbRun(
                    wanted=config.wandb,
                    project=config.project,
                    entity=config.entity,
                    directory=config.directory or directory.parent,
                    description={**description, "config": settings or {}},
                    is_last=is_last,
                    say=self.say,
                )
                self._wandb = run if run.is_wanted else None
            about = About(directory=directory, project=config.project, settings=settings or {}, **description)
            self._trackers = [TrackerRun(name, about, self.say) for name in config.trackers]

    @property
    def wandb_id(self) -> str | None:
        """The id of this stage's W&B run, for `resume`; None without W&B, and on the other ranks."""
        return self._wandb.id if self._wandb is not None else None

    @property
    def has_summary(self) -> bool:
        """Whether there is somewhere for `finish` to put it; not on the other ranks."""
        return self._wandb is not None or bool(self._trackers)

    def say(self, line: str, *, warning: bool = False) -> None:
        """Print one line, from rank 0; a warning goes to stderr."""
        if self.is_main:
            stream = sys.stderr if warning else sys.stdout
            tqdm.write(f"{self.stage}: {'warning: ' if warning else ''}{line}", file=stream)
            stream.flush()

    def progress(self, items: Iterable[T], leg: Leg) -> Iterable[T]:
        """The items of one leg of the stage, behind a bar on a terminal, else with a line now and then."""
        return self._pace.follow(items, leg)

    def resume(self, metrics: Sequence[dict[str, Any]], wandb_id: str | None = None) -> None:
        """Go on where an earlier process was: with its epochs' ``metrics``, and in its W&B run.

        Lines that it wrote to ``metrics.jsonl`` beyond these epochs go.
        """
        if self.is_main:
            self._file = self._path.open("w", encoding="utf-8")
            self._file.writelines(json.dumps(line) + "\n" for line in metrics)
            self._file.flush()
        if self._wandb is not None:
            self._wandb.resume(metrics, wandb_id)
        for tracker in self._trackers:
            tracker.resume(metrics)

    def epoch(self, metrics: dict[str, Any], model: nn.Module, of: int | None = None) -> None:
        """Append one epoch's metrics, ``of`` so many; W&B also gets a histogram of |gamma| per BatchNorm."""
        if not self.is_main:
            return
        if self._file is None:  # of the first epoch: what an earlier attempt left is replaced
            self._file = self._path.open("w", encoding="utf-8")
        try:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        except OSError as error:  # which names no file by itself
            error.filename = str(self._path)
            raise
        self.say(_epoch_line(metrics, of))
        if self._wandb is not None:
            self._wandb.log(metrics, model)
        for tracker in self._trackers:
            tracker.log(metrics)

    def finish(
        self,
        summary: Mapping[str, Any],
        *,
        tables: Mapping[str, Table] | None = None,
        pictures: Mapping[str, Picture] | None = None,
        lineage: Lineage | None = None,
    ) -> None:
        """Make ``summary`` the run's summary in W&B and other trackers; W&B also shows what else there is.

        Nothing is drawn without W&B.
        """
        if self._wandb is not None:
            self._wandb.conclude(summary, tables or {}, pictures or {}, lineage)
        for tracker in self._trackers:
            tracker.conclude(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        for tracker in self._trackers:
            tracker.finish(failed=kind is not None)
        if self._file is not None:
            # after a failed write the rest can't be written either, and the first error is the one to report
            with contextlib.suppress(*([] if kind is None else [OSError])):
                self._file.close()


def _describe(config: RecordConfig, stage: str, run_name: str) -> dict[str, Any]:
    """What every tracker calls a stage, and says of it."""
    return {
        "group": config.group or run_name,
        "name": f"{config.name or run_name} {stage}",
        "job_type": config.job_type or stage.split("-")[0],
        "notes": config.notes,
        "tags": list(config.tags),
    }


def _epoch_line(metrics: Mapping[str, Any], of: int | None) -> str:
    parts = [
        f"epoch {metrics['epoch']}" + ("" if of is None else f"/{of}"),
        f"loss {metrics['train_loss']:.3f}",
        f"accuracy {metrics['accuracy']:.4f}",
        f"{metrics['images_per_second']:.0f} images/s",
    ]
    if "data_wait" in metrics:
        parts.append(f"data wait {100 * metrics['data_wait']:.0f} %")
    if "gpu_memory_mb" in metrics:
        parts.append(f"GPU {metrics['gpu_memory_mb'] / 1000:.1f} GB")
    return "  ".join(parts)
