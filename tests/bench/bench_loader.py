"""netslim's loaders against torch's DataLoader with torchvision's transforms.

python tests/bench/bench_loader.py [--images 10000] [--workers 1] [--repeats 10]
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from results import Cell, Results, medians, new_parser, seconds, take_turns
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from netslim.data import DataConfig, DataInfo, Shard, open_loaders, prepare
from netslim.data.sources import open_source

BATCH, PAD = 128, 4
FFCV, RESIDENT, FILES, MEMORY = "netslim, FFCV", "netslim, device-resident", "torchvision, files", "torchvision, memory"
ABOUT = """An epoch of 32x32 images (scikit-learn's digits, repeated) with the same augmentation, batch size and number
of workers: netslim reads a .beton by FFCV, or holds all images on the device, here the CPU; torch's DataLoader reads
files in folders, or a list of decoded images in memory, through torchvision's v2 transforms. The first epoch, with
compilation and the start of the workers, is shown apart. All compute on one thread."""

Batches = Iterable[tuple[Tensor, Tensor]]


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


def read(batches: Batches) -> None:
    """Every batch is looked at, so that no lazy copy is missed."""
    total = torch.zeros(())
    for images, _ in batches:
        total += images[0, 0, 0, 0]


def netslim_epochs(config: DataConfig, info: DataInfo) -> Iterator[Batches]:
    train = open_loaders(config, info, Shard(0, 1), seed=0, device=torch.device("cpu")).train
    return (train.epoch(number) for number in count())


def torchvision_loader(dataset: Dataset[Any], workers: int) -> DataLoader[Any]:
    return DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    # Else the normalisation waits at OpenMP's barriers for whoever shares the cores: up to eight times slower.
    torch.set_num_threads(1)
    results = Results("Loaders", ABOUT)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        images = write_images(root, options.images)
        beton = DataConfig(
            source="folder",
            root=root,
            cache=root / "cache",
            batch_size=BATCH,
            pad=PAD,
            num_workers=options.workers,
            loader="ffcv",
        )
        resident = replace(beton, loader="device")
        info = prepare(beton, quiet=True)
        fill = tuple(round(255 * mean) for mean in info.mean)
        transform = v2.Compose(
            [
                v2.RandomCrop(beton.size, padding=PAD, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(info.mean, info.std),
            ]
        )
        epochs = {FFCV: netslim_epochs(beton, info), RESIDENT: netslim_epochs(resident, prepare(resident, quiet=True))}
        files = torchvision_loader(ImageFolder(root / "train", transform), options.workers)
        memory = torchvision_loader(InMemory(images, transform), options.workers)
        contestants: dict[str, Callable[[], float]] = {
            FFCV: lambda: seconds(lambda: read(next(epochs[FFCV]))),
            RESIDENT: lambda: seconds(lambda: read(next(epochs[RESIDENT]))),
            FILES: lambda: seconds(lambda: read(files)),
            MEMORY: lambda: seconds(lambda: read(memory)),
        }
        first = medians(take_turns(contestants, 1))
        found = take_turns(contestants, options.repeats)
    num, middle = options.images // BATCH * BATCH, medians(found)
    rows: list[list[Cell]] = [
        [who, num / middle[who], num / max(took), num / min(took), first[who], middle[who] / middle[FFCV]]
        for who, took in found.items()
    ]
    results.table(
        ("loader", "images/s", "slowest epoch", "fastest epoch", "first epoch, s", "time / FFCV's"),
        rows,
        f"{num:,} images, batches of {BATCH}, {options.workers} worker(s), medians of {options.repeats} epochs.",
    )
    results.headline("torchvision from memory / netslim by FFCV, seconds of an epoch", middle[MEMORY] / middle[FFCV])
    results.headline("torchvision from memory / netslim device-resident", middle[MEMORY] / middle[RESIDENT])
    results.finish(options.json)


if __name__ == "__main__":
    main()
