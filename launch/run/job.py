"""The job at hand: what every stage of a run shares, and what earlier stages left for later ones."""

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from netslim.data import Loaders, Shard, open_calibration
from netslim.launch.config import RunConfig
from netslim.launch.run.directory import read_stage
from netslim.launch.run.stage import Stage
from netslim.prune import Calibration, ChannelMap, Chunk, Origin, Plan, chunk_size, embed, load_plan, score_channels
from netslim.train import Runtime, build_model
from netslim.train.models import build_network, is_own
from netslim.train.record import Leg, Pace

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What every stage needs: the configuration, this process's place among the ranks, the images, the directory."""

    preset: str
    config: RunConfig
    run: Runtime
    loaders: Loaders
    directory: Path
    known_scores: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Of each stage's sparse model, by the name of its directory."""

    def path(self, stage: Stage) -> Path:
        return stage.directory(self.directory)

    def build(self, say: Callable[[str], object] = lambda line: None) -> nn.Module:
        """The network before it is slimmed, on this rank's device; ``say`` is given a line of weights from a file."""
        model = build_model(self.config.model, len(self.loaders.info.classes), self.config.seed, say)
        return model.to(self.run.device)

    def build_anew(self) -> nn.Module:
        """The same without weights of a file, which may be gone: for those of a stage to be loaded over it."""
        model = build_model(self.config.model.anew, len(self.loaders.info.classes), self.config.seed)
        return model.to(self.run.device)

    @property
    def origin(self) -> Origin:
        """How the network before it is slimmed can be built again, from the artefact alone."""
        model, num_classes = self.config.model, len(self.loaders.info.classes)
        if is_own(model.name):
            return Origin(function=model.name, num_classes=num_classes)
        function = f"{build_network.__module__}:{build_network.__name__}"
        return Origin(function=function, name=model.name, width=model.width, num_classes=num_classes)

    @property
    def blank_image(self) -> torch.Tensor:
        """One black image, (1, 3, size, size), for what depends on shapes alone."""
        size = self.config.data.size
        return torch.zeros(1, 3, size, size, device=self.run.device)

    def test_images(self, count: int) -> torch.Tensor:
        """The first test images of this rank, (count, 3, size, size) or fewer where it has fewer."""
        images, _ = next(iter(self.loaders.test))
        return images[:count]

    def read(self, stage: Stage) -> nn.Module:
        """The model that a stage left, on every rank; an error names the command that makes it."""
        command = f"netslim {stage.kind.command} {self.preset} --run-dir {self.directory}"
        return self.run.on_all(lambda: read_stage(self.path(stage), self.build_anew, command))

    def read_plan(self, stage: Stage) -> Plan:
        """The plan by which a stage's model was cut; read the model first."""
        plan = load_plan(self.path(stage))
        assert plan is not None, "the stage was read, and writes one"
        return plan

    def read_sparse(self, stage: Stage) -> nn.Module:
        """The model that a sparsity training left, in the shapes of the network before all passes."""
        sparse = self.read(stage)
        return sparse if stage.turn.number == 1 else embed(self.build(), sparse, self.read_plan(stage))

    def scores(self, stage: Stage, sparse: nn.Module, channels: ChannelMap) -> dict[str, torch.Tensor]:
        """What the channels of a stage's sparse model are worth: found once for all ratios that are cut from it."""
        name = stage.directory_name
        if name not in self.known_scores:
            rules = self.config.prune.rules
            calibration = self.calibration if rules.score == "reconstruction" else None
            self.known_scores[name] = score_channels(sparse, channels, rules, calibration)
        return self.known_scores[name]

    @cached_property
    def calibration(self) -> Calibration:
        """The training images that repairs share, over all ranks: opened once for all ratios."""
        shared = self.calibrate(Shard(self.run.rank, self.run.world_size))
        return replace(shared, sum_over_ranks=self.run.sum_over_ranks, show=self.show)

    @property
    def num_calibration(self) -> int:
        """Training images to repair by."""
        return min(self.config.repair.images, self.loaders.info.num_train)

    def calibrate(self, shard: Shard) -> Calibration:
        """Training images to repair by, of which this process reads its share."""
        num_images = self.num_calibration
        loader = open_calibration(
            self.config.data,
            self.loaders.info,
            shard,
            num_images=num_images,
            chunk_size=chunk_size(num_images),
            seed=self.config.seed,
            device=self.run.device,
        )
        return Calibration(
            read=lambda: (Chunk(*chunk) for chunk in loader),
            num_images=loader.num_images,
            example=loader.first(2),
            say=self.warn,
        )

    def warn(self, line: str) -> None:
        """Say what a user should know of the stage at hand, from rank 0."""
        if self.run.is_main:
            print(f"{self.run.place}: warning: {line}", file=sys.stderr, flush=True)

    def show(self, items: Collection[T], what: str) -> Iterable[T]:
        """The items behind a progress bar, or with a line now and then."""
        stage, seconds = self.run.place, self.config.record.progress_seconds

        def say(line: str) -> None:
            print(f"{stage}: {line}", flush=True)

        pace = Pace(stage, say, is_main=self.run.is_main, seconds=seconds)
        return pace.follow(items, Leg(what=what, total=len(items)))
