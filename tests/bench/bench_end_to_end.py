"""From images to a fine-tuned slim network: netslim, with and without slimming in flight, against a plain script.

    python tests/bench/bench_end_to_end.py                                       digits, minutes
    python tests/bench/bench_end_to_end.py --root DIR --width 0.25 --epochs 12   folders of images, as CIFAR-10's

The plain script is below: one process, DataLoader and torchvision's transforms, a loop over the layers for the gammas
at every step, float32, as such scripts are. All have the same network, batches, schedule, lambda, ratio and cores, and
take turns. Writes JSON beside the table with --json FILE.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from netslim.data import DataConfig
from netslim.data.sources import open_source
from netslim.prune import slim
from netslim.train import FitConfig, ModelConfig, build_model
from netslim.train.optim import learning_rate

NETSLIM = Path(sys.executable).with_name("netslim")
PAD = {"digits": 2, "folder": 4}


class InMemory(Dataset[tuple[Tensor, int]]):
    """Decoded once, as torchvision's CIFAR10 is."""

    def __init__(self, source: Any, size: int, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform
        self.items = [
            (Image.fromarray(pixels).convert("RGB").resize((size, size)), int(label)) for pixels, label in source
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.items[index]
        return self.transform(image), label


def plain_script(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Sparsity training, global-threshold pruning and fine-tuning, with nothing but torch and torchvision."""
    torch.manual_seed(seed)
    config = data_config(options)
    source = open_source(config)
    normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    flips = [] if options.root is None else [v2.RandomHorizontalFlip()]
    augment = v2.Compose([v2.RandomCrop(config.size, padding=config.pad), *flips, *normalise])
    train_set = InMemory(source.train, config.size, augment)
    test_set = InMemory(source.test, config.size, v2.Compose(normalise))
    train = DataLoader(
        train_set, config.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    test = DataLoader(test_set, 256)
    model = build_model(ModelConfig(name=options.model, width=options.width), num_classes=10, seed=seed)
    started = time.perf_counter()
    fit(model, train, test, fit_config(options.epochs, options.lr), options.weight)
    sparse_seconds = time.perf_counter() - started
    model, _ = slim(
        model, torch.zeros(1, 3, config.size, config.size), ratio=options.ratio, min_share=options.min_share
    )
    accuracy = fit(model, train, test, fit_config(options.finetune_epochs, options.finetune_lr), 0.0)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "sparse_seconds": sparse_seconds, "accuracy": accuracy}


def fit(model: nn.Module, train: DataLoader[Any], test: DataLoader[Any], config: FitConfig, weight: float) -> float:
    """Train, test after each epoch, and return the last accuracy."""
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    accuracy, step = 0.0, 0
    for _ in range(config.epochs):
        model.train()
        for images, labels in train:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps_per_epoch=len(train), config=config)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if weight:
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d) and module.weight.grad is not None:
                        module.weight.grad.add_(weight * torch.sign(module.weight.detach()))
            optimizer.step()
            step += 1
        model.eval()
        with torch.no_grad():
            right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in test)
        accuracy = right / len(test.dataset)  # type: ignore[arg-type]
    return accuracy


def fit_config(epochs: int, lr: float) -> FitConfig:
    return FitConfig(epochs=epochs, lr=lr, schedule="onecycle")


def data_config(options: argparse.Namespace) -> DataConfig:
    source = "digits" if options.root is None else "folder"
    return DataConfig(
        source=source, root=options.root, size=32, batch_size=64, flip=options.root is not None, pad=PAD[source]
    )


def netslim(options: argparse.Namespace, seed: int, method: list[str], cache: Path) -> dict[str, float]:
    """The same by the command netslim, in a process for each core."""
    with tempfile.TemporaryDirectory() as scratch:
        data = data_config(options)
        flags: list[object] = [
            *("--run-dir", f"{scratch}/run", "--seed", seed, "--record.wandb", "disabled", "--data.cache", cache),
            *("--data.source", data.source, *(["--data.root", data.root] if data.root else [])),
            *("--data.pad", data.pad, *(["--data.flip"] if data.flip else []), "--data.batch-size", data.batch_size),
            *("--model.name", options.model, "--model.width", options.width, "--prune.ratio", options.ratio),
            *("--sparsify.epochs", options.epochs, "--sparsify.lr", options.lr, "--sparsity.weight", options.weight),
            *("--finetune.epochs", options.finetune_epochs, "--finetune.lr", options.finetune_lr),
            *("--prune.min-share", options.min_share, "--num-processes", len(os.sched_getaffinity(0)), *method),
        ]
        started = time.perf_counter()
        command = [str(NETSLIM), "run", "digits", *map(str, flags)]  # whose schedules are those of fit_config
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        rows = json.loads(Path(scratch, "run", "results.json").read_text())["rows"]
    sparse, last = rows[0], rows[-1]
    cut = next(row for row in rows if row["stage"] == "cut")
    return {
        "seconds": seconds,
        "sparse_seconds": sparse["seconds"],
        "accuracy": last["accuracy"],
        "sparse_accuracy": sparse["accuracy"],
        "cut_accuracy": cut["accuracy"],
    }


def contestants(options: argparse.Namespace, cache: Path) -> Iterator[tuple[str, Callable[[int], dict[str, float]]]]:
    # each in a process of its own, as a user would start it
    yield (
        "plain script",
        lambda seed: json.loads(
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--plain-seed", str(seed)], check=True, stdout=subprocess.PIPE
            ).stdout.splitlines()[-1]
        ),
    )
    yield "netslim", lambda seed: netslim(options, seed, [], cache)
    proximal = ["--sparsity.method", "proximal"]
    yield (
        "netslim, in flight",
        lambda seed: netslim(
            options, seed, [*proximal, "--sparsity.reconfigure-every", str(options.reconfigure_every)], cache
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", type=Path, help="folders train/CLASS and test/CLASS; without it the digits")
    parser.add_argument("--model", default="vgg11")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--finetune-epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--finetune-lr", type=float, default=0.02)
    parser.add_argument("--weight", type=float, default=1e-2, help="lambda")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--min-share", type=float, default=0.05)
    parser.add_argument("--reconfigure-every", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain-seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain_seed is not None:
        print(json.dumps(plain_script(options, options.plain_seed)))
        return
    with tempfile.TemporaryDirectory() as cache:
        write = ["data", "digits", "--data.cache", cache]
        if options.root is not None:
            write += ["--data.source", "folder", "--data.root", str(options.root)]
        subprocess.run([NETSLIM, *write], check=True, stdout=subprocess.DEVNULL)  # once, for all runs of a user
        found: dict[str, list[dict[str, float]]] = {}
        for seed in options.seeds:
            for name, run in contestants(options, Path(cache)):
                found.setdefault(name, []).append(run(seed))
                print(name, seed, found[name][-1], flush=True)
    report(options, found)


def report(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    about = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        "options": {key: str(value) for key, value in vars(options).items()},
    }
    print(f"\n{about['machine']}, {about['versions']}; medians of {len(options.seeds)} seeds")
    base = statistics.median(run["seconds"] for run in found["plain script"])
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        accuracy = statistics.mean(run["accuracy"] for run in runs)
        print(f"{name:20} {seconds:8.1f} s  {seconds / base:5.2f} of the plain script's  accuracy {accuracy:.2%}")
    if options.json:
        options.json.write_text(json.dumps({**about, "runs": found}, indent=2))


if __name__ == "__main__":
    main()
