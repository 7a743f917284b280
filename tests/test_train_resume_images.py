"""The images that a network sees, out of the real loaders, are the same wherever training is interrupted."""

import hashlib
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_train_distributed import new_runtime
from test_train_resume import CrashError
from torch import Tensor, nn

from netslim.data import DataConfig, Loaders, Shard, open_loaders, prepare
from netslim.data.batches.loaders import TrainLoader
from netslim.train import CheckpointConfig, EngineConfig, FitConfig, Record, Runtime, Saver, Store, fit

BATCH, STEPS = 288, 5
Seen = list[list[str]]
"""The sha256 of each image of each micro-batch that this rank trained on."""


class Watching(nn.Sequential):
    """A small network that notes what it is trained on."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        self.seen: Seen = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append([hashlib.sha256(image.contiguous().numpy()).hexdigest() for image in images])
        logits: Tensor = super().forward(images)
        return logits


class Dying:
    """The real loader, until some micro-batches are read: the process ends there."""

    def __init__(self, loader: TrainLoader, batches: int) -> None:
        self.loader, self.left = loader, batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader.epoch(epoch, first_batch):
            if not self.left:
                raise CrashError
            self.left -= 1
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


def open_images(run: Runtime, cache: Path, loader: str) -> Loaders:
    config = DataConfig(
        **{"cache": cache, "loader": loader, "num_workers": 0},  # type: ignore[arg-type]
        **{"size": 16, "batch_size": BATCH, "flip": True, "pad": 2},  # type: ignore[arg-type]
    )
    shard, parts, device = Shard(run.rank, run.world_size), run.config.accumulation, torch.device("cpu")
    return open_loaders(config, prepare(config, quiet=True), shard, seed=3, accumulation=parts, device=device)


def train(directory: Path, run: Runtime, loaders: Loaders, epochs: int, die_after: int | None = None) -> Seen:
    """What this rank saw in a run that ends after so many micro-batches, or at its end."""
    torch.manual_seed(0)
    model = Watching()
    saver = Saver(Store(directory / "checkpoints"), run, CheckpointConfig(steps=1), {"stage": "sparse"})
    images = loaders.train if die_after is None else Dying(loaders.train, die_after)
    with Record("sparse", directory, is_main=run.is_main) as record:
        try:
            fit(model, images, loaders.test, FitConfig(epochs=epochs), run=run, record=record, saver=saver)
        except CrashError:
            run.release()
    return model.seen


def interrupt_everywhere(
    directory: Path, cache: Path, loader: str, accumulation: int, epochs: int, others: int | None, interrupted: bool
) -> dict[str, Seen]:
    """What this rank saw: undisturbed (whole), in runs that end after each step, and in those that go on from there.

    Runs are left for groups of other sizes to go on with, and those that a group of the size ``others`` left gone on
    with; unless ``interrupted``, only that is done.
    """
    run = new_runtime(EngineConfig(accumulation=accumulation))
    loaders, size = open_images(run, cache, loader), run.world_size
    found = {}
    if interrupted:
        found["whole"] = train(directory / f"whole-{size}", run, loaders, epochs)
    for step in range(STEPS * epochs):
        left = directory / f"left-by-{size}" / str(step)
        if interrupted:
            found[f"until {step}"] = train(left, run, loaders, epochs, step * accumulation)
        for before in ([size] if interrupted else []) + ([others] if others else []):
            place = directory / f"{before}-{size}" / str(step)
            run.on_main(partial(shutil.copytree, directory / f"left-by-{before}" / str(step), place))
            found[f"{before}-{size} from {step}"] = train(place, run, loaders, epochs)
    return found


def together(ranks: list[dict[str, Seen]], key: str, accumulation: int) -> Seen:
    """The images of each global batch in order: of its first micro-batch rank after rank, then of its second."""
    of_ranks = zip(*(rank[key] for rank in ranks), strict=True)
    micro_batches = [list(chain.from_iterable(of_each)) for of_each in of_ranks]
    starts = range(0, len(micro_batches), accumulation)
    return [list(chain.from_iterable(micro_batches[start : start + accumulation])) for start in starts]


@pytest.mark.parametrize(
    ("loader", "accumulation", "epochs", "more_ranks"),
    [
        ("ffcv", 1, 1, False),
        pytest.param("ffcv", 2, 2, True, marks=pytest.mark.slow),
        pytest.param("torch", 1, 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_interrupted_after_any_step_sees_the_images_that_it_would_have_seen(
    loader: str,
    accumulation: int,
    epochs: int,
    more_ranks: bool,
    tmp_path: Path,
    data_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    common = (tmp_path / "runs", data_cache, loader, accumulation, epochs)
    two = run_ranks(interrupt_everywhere, 2, tmp_path, *common, None, True)
    one = [interrupt_everywhere(*common, 2, True)]
    want = together(one, "whole", accumulation)
    assert [len(set(batch)) for batch in want] == [BATCH] * STEPS * epochs
    assert together(two, "whole", accumulation) == want
    cases = [(1, one, 1, one), (2, two, 2, two), (2, two, 1, one)]
    if more_ranks:
        cases.append((1, one, 2, run_ranks(interrupt_everywhere, 2, tmp_path, *common, 1, False)))
    for before, first, after, second in cases:
        for step in range(STEPS * epochs):
            seen = together(first, f"until {step}", accumulation)
            assert len(seen) == step
            assert seen + together(second, f"{before}-{after} from {step}", accumulation) == want, (before, after, step)
