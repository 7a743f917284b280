"""FFCV's loader against torchvision's own, with the same augmentation, batch size and number of workers.

    python tests/bench/bench_loader.py [--images 10000] [--workers 1] [--repeats 3]

Both read 32x32 images (scikit-learn's digits, repeated): FFCV from a .beton; torch's DataLoader, with torchvision's
v2 transforms, from files in folders and from a list of images in memory. Repetitions are interleaved, so that a busy
machine slows all alike; the first epoch, with compilation and the start of the workers, is shown apart.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from netslim.data import DataConfig, Shard, open_loaders, prepare
from netslim.data.sources import open_source

BATCH = 128
PAD = 4


class InMemory(Dataset[Any]):
    """Decoded images and labels: what torchvision's CIFAR classes hold."""

    def __init__(self, images: list[tuple[Image.Image, int]], transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return self.transform(image), label


def write_images(root: Path, num: int) -> list[tuple[Image.Image, int]]:
    """`num` training images as PNG files in folders, and the same in memory; a few to test."""
    split = open_source(DataConfig()).train
    images = []
    for i in range(num):
        pixels, label = split[i % len(split)]
        images.append((Image.fromarray(pixels), label))
        for part in ("train", "test") if i < 100 else ("train",):
            folder = root / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            images[i][0].save(folder / f"{i}.png", compress_level=1)
    return images


def seconds(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """How long reading all batches takes; each is looked at, so that no lazy copy is missed."""
    start = time.perf_counter()
    total = torch.zeros(())
    for images, _ in batches:
        total += images[0, 0, 0, 0]
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    # Else the normalisation waits at OpenMP's barriers for whoever shares the cores: up to eight times slower.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        images = write_images(root, args.images)
        config = DataConfig(
            source="folder", root=root, cache=root / "cache", batch_size=BATCH, pad=PAD, num_workers=args.workers
        )
        start = time.perf_counter()
        info = prepare(config, quiet=True)
        print(f"prepare: {info.num_train} images in {time.perf_counter() - start:.1f} s, once")
        train = open_loaders(config, info, Shard(0, 1), seed=0, device=torch.device("cpu")).train
        fill = tuple(round(255 * mean) for mean in info.mean)
        transform = v2.Compose(
            [
                v2.RandomCrop(config.size, padding=PAD, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(info.mean, info.std),
            ]
        )
        options: dict[str, Any] = {
            "batch_size": BATCH,
            "shuffle": True,
            "drop_last": True,
            "num_workers": args.workers,
            "persistent_workers": args.workers > 0,
        }
        folder = DataLoader(ImageFolder(root / "train", transform), **options)
        memory = DataLoader(InMemory(images, transform), **options)
        epochs = iter(range(args.repeats + 1))
        contestants: dict[str, Callable[[], float]] = {
            "netslim, FFCV": lambda: seconds(train.epoch(next(epochs))),
            "torchvision, files": lambda: seconds(folder),
            "torchvision, memory": lambda: seconds(memory),
        }
        first = {name: run() for name, run in contestants.items()}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(args.repeats):
            for name, run in contestants.items():
                times[name].append(run())
    report(args, len(train) * BATCH, first, times)


def report(args: argparse.Namespace, num: int, first: dict[str, float], times: dict[str, list[float]]) -> None:
    """Medians, their spread and the ratio to FFCV, under the machine and the versions."""
    cores = len(os.sched_getaffinity(0))
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, ffcv {version('ffcv')}"
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, {versions}")
    print(f"32x32, batch {BATCH}, {args.workers} worker(s), {args.repeats} epochs of {num} images, medians")
    best = statistics.median(times["netslim, FFCV"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(
            f"{name:20} {num / median:9,.0f} images/s  ({num / max(measured):,.0f} to {num / min(measured):,.0f})  "
            f"first epoch {first[name]:.1f} s  FFCV is {median / best:.1f} times as fast"
        )


if __name__ == "__main__":
    sys.exit(main())
