"""What checkpoints cost a training run: the share of its time, with one after every epoch (the default) and without.

    python tests/bench/bench_checkpoint.py [--networks digits vgg19] [--repeats 5] [--directory DIR]

Both trainings do the same steps on images in memory; repetitions are interleaved, so that a busy machine slows both
alike. digits is the preset's network with its epoch of 1,437 images. For vgg19 an epoch of CIFAR-10 takes minutes on
a CPU, so that only some of its steps are done: the last column says what the seconds of one checkpoint are of a whole
epoch at the measured speed. On a GPU (--device cuda) --images 50000 does the whole of it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from netslim.launch.presets import find_preset
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
    store = None if directory is None else Store(directory)
    with tempfile.TemporaryDirectory() as place, Record("bench", Path(place), is_main=True) as record:
        started = time.perf_counter()
        fit(
            model,
            images,
            images,
            FitConfig(epochs=EPOCHS, lr=0.01),
            run=run,
            record=record,
            saver=Saver(store, run, CheckpointConfig()),
        )
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--images", type=int, help="of an epoch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", help="where checkpoints are written; the disk matters")
    options = parser.parse_args()
    run = Runtime(EngineConfig(), seed=0)
    lines = []
    for name in options.networks:
        case = CASES[name]
        if options.images:
            case = Case(case.model, options.images, options.images)
        without, with_, sizes = [], [], []
        for _ in range(options.repeats):
            without.append(train(case, run, None))
            with tempfile.TemporaryDirectory(dir=options.directory) as directory:
                with_.append(train(case, run, Path(directory)))
                sizes.append(sum(file.stat().st_size for file in next(Path(directory).iterdir()).iterdir()))
        base = statistics.median(without)
        extra = statistics.median(b - a for a, b in zip(without, with_, strict=True)) / EPOCHS
        share = extra / (base / EPOCHS * case.epoch / case.images)
        lines.append(f"{name:>8} {base:9.2f} {extra:13.4f} {sizes[0] / 1e6:6.1f} {case.epoch:7} {share:14.2%}")
    print(" network  s without  s a checkpoint     MB  images  share of epoch")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
