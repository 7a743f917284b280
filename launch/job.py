"""What the stages of a run share: the job at hand, what earlier stages left, and how a stage records and ends."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from netslim.data import Loaders, Shard, open_calibration
from netslim.launch.artefacts import (
    STAGES,
    Pass,
    is_complete,
    read_stage,
    stage_directories,
    stage_directory,
    write_stage,
)
from netslim.launch.config import RunConfig, to_dict
from netslim.launch.report import read_rows, write_results
from netslim.launch.summary import (
    accuracies,
    dataset,
    done_line,
    flat,
    latencies,
    stage_artefact,
)
from netslim.prune import (
    Calibration,
    ChannelMap,
    Chunk,
    Origin,
    Plan,
    chunk_size,
    cost,
    embed,
    load_plan,
    score_channels,
)
from netslim.train import (
    ModelConfig,
    Record,
    Runtime,
    build_model,
)
from netslim.train.models import build_network, is_own
from netslim.train.pace import Leg, Pace
from netslim.train.wandb_content import Lineage, Picture

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What every stage needs: the configuration, this process's place among the ranks, the images, the directory."""

    preset: str
    config: RunConfig
    run: Runtime
    loaders: Loaders
    directory: Path
    known_scores: dict[Path, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Of the sparse model in each directory."""

    @cached_property
    def calibration(self) -> Calibration:
        """The training images that repairs share, over all ranks: opened once for all ratios."""
        shard = Shard(self.run.rank, self.run.world_size)
        return replace(calibrate(self, shard), sum_over_ranks=self.run.sum_over_ranks, show=self.show)

    def show(self, items: Collection[T], what: str) -> Iterable[T]:
        """The items behind a progress bar, or with a line now and then."""
        stage, seconds = self.run.place, self.config.record.progress_seconds

        def say(line: str) -> None:
            print(f"{stage}: {line}", flush=True)

        pace = Pace(stage, say, is_main=self.run.is_main, seconds=seconds)
        return pace.follow(items, Leg(what=what, total=len(items)))

    def scores(self, turn: Pass, sparse: nn.Module, channels: ChannelMap) -> dict[str, torch.Tensor]:
        """What the channels of a sparse model are worth: found once for all ratios that are cut from it."""
        directory = self.path("sparsify", turn)
        if directory not in self.known_scores:
            rules = self.config.prune.rules
            calibration = self.calibration if rules.score == "reconstruction" else None
            self.known_scores[directory] = score_channels(sparse, channels, rules, calibration)
        return self.known_scores[directory]

    def build(self) -> nn.Module:
        """The network before it is slimmed, newly initialised, on this rank's device."""
        model = build_model(self.config.model, len(self.loaders.info.classes), self.config.seed)
        return model.to(self.run.device)

    def path(self, stage: str, turn: Pass | None = None) -> Path:
        return stage_directory(self.directory, stage, turn)

    def is_done(self, directory: Path) -> bool:
        """Whether a stage is complete; rank 0 looks, so that all ranks agree also where storage lags."""
        self.run.place = directory.name
        return self.run.on_main(lambda: is_complete(directory))

    def read(self, directory: Path, command: str) -> nn.Module:
        """The model that a stage left, on every rank; an error names the command that makes it."""
        command = f"netslim {command} {self.preset} --run-dir {self.directory}"
        return self.run.on_all(lambda: read_stage(directory, self.build, command))


def calibrate(job: Job, shard: Shard) -> Calibration:
    """Training images to repair by, of which this process reads its share."""
    num_images = min(job.config.repair.images, job.loaders.info.num_train)
    loader = open_calibration(
        job.config.data,
        job.loaders.info,
        shard,
        num_images=num_images,
        chunk_size=chunk_size(num_images),
        seed=job.config.seed,
        device=job.run.device,
    )
    return Calibration(
        read=lambda: (Chunk(*chunk) for chunk in loader), num_images=loader.num_images, example=loader.first(2)
    )


def read_plan(directory: Path) -> Plan:
    plan = load_plan(directory)
    assert plan is not None, "the stage was read, and writes one"
    return plan


def slim_directory(job: Job, turn: Pass) -> Path:
    """Where a pass left its network."""
    return job.path("repair" if job.config.repair.steps else "prune", turn)


def read_slim(job: Job, turn: Pass) -> tuple[nn.Module, Plan]:
    """The network that a pass left, repaired where there is a repair, and its plan."""
    directory = slim_directory(job, turn)
    return job.read(directory, directory.name.split("-")[0]), read_plan(directory)


def read_sparse(job: Job, turn: Pass) -> nn.Module:
    """The network that a pass trained, in the shapes of the network before all passes."""
    directory = job.path("sparsify", turn)
    sparse = job.read(directory, "sparsify")
    return sparse if turn.number == 1 else embed(job.build(), sparse, read_plan(directory))


def open_record(job: Job, directory: Path, row: dict[str, Any]) -> Record:
    """The record of a stage; what W&B calls its config has the same names in every stage and every run."""
    about = {
        "preset": job.preset,
        "world_size": job.run.world_size,
        "stage": row["stage"],
        "ratio": row["ratio"],
        "lambda": job.config.sparsity.weight,
    }
    return Record(
        directory.name,
        directory,
        is_main=job.run.is_main,
        config=job.config.record,
        run_name=job.directory.name,
        settings=flat({**to_dict(job.config), **about}),
        is_last=directory == stage_directories(job.directory, STAGES, job.config)[-1],
    )


def conclude(
    job: Job,
    record: Record,
    directory: Path,
    metrics: dict[str, Any],
    sources: Sequence[Path],
    tables: Mapping[str, Sequence[dict[str, Any]]] | None = None,
    pictures: Mapping[str, Picture] | None = None,
) -> None:
    """Say how a stage ended; in W&B also what the stages before it came to, and the artefacts it was made from."""
    record.say(done_line(metrics))
    if record.wandb_id is None:
        return
    known = accuracies(read_rows(job.directory), metrics["ratio"])
    about = {"lambda": job.config.sparsity.weight, "world_size": job.run.world_size}
    lineage = None
    if job.config.record.artifacts:
        name, images = job.directory.name, dataset(job.config.data, job.loaders.info)
        used = (images, *(stage_artefact(source, name) for source in sources))
        lineage = Lineage(made=stage_artefact(directory, name), used=used)
    record.finish({**metrics, **known, **about}, tables=tables, pictures=pictures, lineage=lineage)


def finish(
    job: Job, model: nn.Module, plan: Plan | None, directory: Path, metrics: dict[str, Any], started: float
) -> dict[str, Any]:
    """Rank 0 writes the artefact and results.json; returns the metrics with costs added."""

    def write() -> dict[str, Any]:
        price = cost(model, blank_image(job))
        spent = {"seconds": time.perf_counter() - started, **latencies(model, blank_image(job))}
        complete = write_stage(
            directory, model, plan, job.config, {**metrics, "params": price.params, "macs": price.macs, **spent}
        )
        write_results(
            job.directory,
            preset=job.preset,
            world_size=job.run.world_size,
            loader=job.loaders.info.loader,
            device=job.run.device.type,
            engine=job.run.engine,
        )
        return complete

    return job.run.on_main(write)


def blank_image(job: Job) -> torch.Tensor:
    """One black image, (1, 3, size, size), for what depends on shapes alone."""
    size = job.config.data.size
    return torch.zeros(1, 3, size, size, device=job.run.device)


def origin(config: ModelConfig, num_classes: int) -> Origin:
    """What the plan says about how to build the network again."""
    if is_own(config.name):
        return Origin(function=config.name, num_classes=num_classes)
    function = f"{build_network.__module__}:{build_network.__name__}"
    return Origin(function=function, name=config.name, width=config.width, num_classes=num_classes)
