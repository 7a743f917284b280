"""What checkpoints cost a training run.

python tests/bench/bench_checkpoint.py [--networks digits vgg19] [--repeats 5] [--directory DIR]
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from results import Cell, Results, new_parser, seconds, take_turns
from torch import Tensor

from netslim.launch.presets import find_preset
from netslim.launch.run.processes import keep_freed_memory
from netslim.train import (
    CheckpointConfig,
    EngineConfig,
    FitConfig,
    ModelConfig,
    Record,
    Runtime,
    Saver,
    Store,
    build_model,
    fit,
)

BATCH, EPOCHS = 64, 4
ABOUT = """Training with a checkpoint after every epoch, as by default, against the same training without. Images are in
memory, so that no loader is measured. digits is the preset's network with its epoch of 1,437 images. Of an epoch of
CIFAR-10, which takes minutes on a CPU, VGG-19 does some of the steps, and the last column says what a checkpoint is of
a whole epoch at the measured speed. A checkpoint's seconds are the median difference of neighbouring repetitions."""
COLUMNS = (
    "network",
    "without, s",
    "with, s",
    "a checkpoint, s",
    "a checkpoint, MB",
    "images of an epoch",
    "share of an epoch, %",
)


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    images: int
    """Of one epoch here."""
    epoch: int
    """Of one epoch in earnest."""


CASES = {
    "digits": Case(find_preset("digits")().model, 1437, 1437),
    "vgg19": Case(ModelConfig(name="vgg19"), 512, 50_000),
}


class Images:
    """The same random batch again and again: it is not the loader that is measured."""

    def __init__(self, num: int, device: torch.device) -> None:
        self.num = num // BATCH
        self.batch = (torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(0, 10, (BATCH,), device=device))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * (self.num - first_batch))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch])

    def __len__(self) -> int:
        return self.num


def train(case: Case, run: Runtime, directory: Path | None) -> float:
    """Seconds of one training, with checkpoints where a directory is given."""
    model, images = build_model(case.model, 10, 0), Images(case.images, run.device)
    saver = Saver(None if directory is None else Store(directory), run, CheckpointConfig())
    config = FitConfig(epochs=EPOCHS, lr=0.01)
    with tempfile.TemporaryDirectory() as place, Record("bench", Path(place), is_main=True) as record:
        return seconds(lambda: fit(model, images, images, config, run=run, record=record, saver=saver))


def without_checkpoints(case: Case, run: Runtime) -> tuple[float, int]:
    return train(case, run, None), 0


def with_checkpoints(case: Case, run: Runtime, parent: str | None) -> tuple[float, int]:
    """Seconds of one training, and bytes of a checkpoint."""
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        took = train(case, run, Path(directory))
        return took, sum(file.stat().st_size for file in next(Path(directory).iterdir()).iterdir())


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--images", type=int, help="of an epoch; 50000 on a GPU does the whole of CIFAR-10's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", help="where checkpoints are written; the disk matters")
    options = parser.parse_args()
    keep_freed_memory()
    run = Runtime(EngineConfig(), seed=0)
    results = Results("Checkpoints", ABOUT)
    rows: list[list[Cell]] = []
    for name in options.networks:
        case = CASES[name]
        if options.images:
            case = replace(case, images=options.images, epoch=options.images)
        contestants = {
            "without": partial(without_checkpoints, case, run),
            "with": partial(with_checkpoints, case, run, options.directory),
        }
        found = take_turns(contestants, options.repeats)
        without, with_ = ([took for took, _ in found[who]] for who in contestants)
        base = statistics.median(without)
        extra = statistics.median(b - a for a, b in zip(without, with_, strict=True)) / EPOCHS
        share = 100 * extra / (base / EPOCHS * case.epoch / case.images)
        size = found["with"][0][1] / 1e6
        rows.append([name, base, statistics.median(with_), extra, size, case.epoch, share])
    results.table(COLUMNS, rows, f"{EPOCHS} epochs, batches of {BATCH}, medians of {options.repeats}.")
    results.headline(f"a checkpoint, % of an epoch of {rows[-1][0]}", rows[-1][-1])
    results.finish(options.json)


if __name__ == "__main__":
    main()
