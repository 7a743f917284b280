"""From images to a fine-tuned slim network: netslim, with and without slimming in flight, against a plain script.

    python tests/bench/bench_end_to_end.py                            digits, minutes
    python tests/bench/bench_end_to_end.py --root ~/cifar10 --model vgg19 --epochs 8 --weight 1e-3 --seeds 0 1 2

The plain script is below: one process, DataLoader and torchvision's transforms, a loop over the layers for the gammas
at every step, float32, as such scripts are. All have the same network, batches, schedule, lambda, ratio and cores, and
take turns. With --log FILE each finished run is kept there, and an interrupted benchmark goes on.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from results import Results, new_parser
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from netslim.data import DataConfig
from netslim.data.sources import open_source
from netslim.prune import slim
from netslim.train import FitConfig, ModelConfig, build_model
from netslim.train.optim import learning_rate

Found = dict[str, Any]
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


def plain_script(options: argparse.Namespace, seed: int) -> Found:
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


def netslim(options: argparse.Namespace, seed: int, method: Sequence[object], cache: Path) -> Found:
    """The same by the command netslim, in a process for each core; then, untimed, the other ratios."""
    data = data_config(options)
    flags: list[object] = [
        *("--seed", seed, "--record.wandb", "disabled", "--data.cache", cache),
        *("--data.source", data.source, *(["--data.root", data.root] if data.root else [])),
        *("--data.pad", data.pad, *(["--data.flip"] if data.flip else []), "--data.batch-size", data.batch_size),
        *("--model.name", options.model, "--model.width", options.width),
        *("--sparsify.epochs", options.epochs, "--sparsify.lr", options.lr, "--sparsity.weight", options.weight),
        *("--finetune.epochs", options.finetune_epochs, "--finetune.lr", options.finetune_lr),
        *("--prune.min-share", options.min_share, "--num-processes", len(os.sched_getaffinity(0)), *method),
    ]  # the schedules of the preset digits are those of fit_config
    with tempfile.TemporaryDirectory() as scratch:
        sparse, rows, seconds = Path(scratch, f"{options.ratio}", "sparse"), {}, []
        for ratio in (options.ratio, *options.also):
            directory = Path(scratch, f"{ratio}")
            if rows:
                shutil.copytree(sparse, directory / "sparse")
            started = time.perf_counter()
            command = [NETSLIM, "run", "digits", "--run-dir", directory, "--prune.ratio", ratio, *flags]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
            rows[f"{ratio}"] = json.loads((directory / "results.json").read_text())["rows"]
        epochs = [json.loads(line) for line in (sparse / "metrics.jsonl").read_text().splitlines()]
    first = rows[f"{options.ratio}"]
    return {
        "seconds": seconds[0],
        "sparse_seconds": first[0]["seconds"],
        "accuracy": first[-1]["accuracy"],
        "stages": {
            ratio: {row["stage"]: {key: row[key] for key in ("accuracy", "macs", "seconds")} for row in found}
            for ratio, found in rows.items()
        },
        "epochs": [
            {key: line.get(key) for key in ("images_per_second", "channels_gone", "macs", "accuracy")}
            for line in epochs
            if "epoch" in line
        ],
    }


def contestants(options: argparse.Namespace, cache: Path) -> dict[str, Callable[[int], Found]]:
    proximal = ["--sparsity.method", "proximal", "--sparsity.reconfigure-every", 0]
    in_flight = [*proximal[:-1], options.reconfigure_every]

    def alone(seed: int) -> Found:
        """In a process of its own, as a user would start it."""
        command = [sys.executable, __file__, *sys.argv[1:], "--plain-seed", str(seed)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        return dict(json.loads(said.splitlines()[-1]))

    return {
        "plain script": alone,
        "netslim": lambda seed: netslim(options, seed, proximal, cache),
        "netslim, in flight": lambda seed: netslim(options, seed, in_flight, cache),
    }


def run_all(options: argparse.Namespace, cache: Path) -> dict[str, list[Found]]:
    """Every contestant with every seed, but for what the log has already; the order turns round with every seed."""
    found: dict[str, dict[int, Found]] = {name: {} for name in contestants(options, cache)}
    if options.log is not None and options.log.exists():
        for line in map(json.loads, options.log.read_text().splitlines()):
            if line["options"] == settings(options):
                found[line["name"]][line["seed"]] = line["run"]
    for number, seed in enumerate(options.seeds):
        for name, run in list(contestants(options, cache).items())[:: -1 if number % 2 else 1]:
            if seed in found[name]:
                continue
            found[name][seed] = run(seed)
            print(name, seed, found[name][seed], flush=True)
            if options.log is not None:
                with options.log.open("a") as file:
                    line = {"name": name, "seed": seed, "options": settings(options), "run": found[name][seed]}
                    file.write(json.dumps(line) + "\n")
    return {name: [runs[seed] for seed in options.seeds] for name, runs in found.items()}


def settings(options: argparse.Namespace) -> dict[str, str]:
    """What a run depends on."""
    return {key: str(value) for key, value in vars(options).items() if key not in ("json", "log", "seeds")}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--root", type=Path, help="folders train/CLASS and test/CLASS; without it the digits")
    parser.add_argument("--model", default="vgg11")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--finetune-epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--finetune-lr", type=float, default=0.02)
    parser.add_argument("--weight", type=float, default=1e-2, help="lambda")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--also", type=float, nargs="*", default=[0.7], help="ratios to prune and fine-tune, untimed")
    parser.add_argument("--min-share", type=float, default=0.05)
    parser.add_argument("--reconfigure-every", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--log", type=Path)
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
        found = run_all(options, Path(cache))
    results = Results("End to end", about(options))
    show_times(results, found)
    show_stages(results, found)
    show_epochs(results, found["netslim, in flight"])
    results.finish(options.json)


def about(options: argparse.Namespace) -> str:
    source = open_source(data_config(options))
    name = "scikit-learn's digits" if options.root is None else options.root.name
    images = f"{len(source.train):,} training and {len(source.test):,} test images ({name})"
    return f"""From images to a fine-tuned slim network: sparsity training ({options.epochs} epochs, lambda
        {options.weight:g}, lr {options.lr:g}), {options.ratio:.0%} of the channels pruned, and fine-tuning
        ({options.finetune_epochs} epochs) of {options.model} at width {options.width:g} on {images}, batches of
        {data_config(options).batch_size}, seeds {", ".join(map(str, options.seeds))}. The plain script is of the usual
        kind: one process with all cores, torch's DataLoader with two workers, torchvision's transforms, a loop over the
        layers that adds lambda x sign(gamma), float32. netslim runs in one process for each core, with proximal steps;
        in flight it also removes the channels at zero after every {options.reconfigure_every} epoch(s). Its time is
        that of the whole command: start-up, compilation of the loader, pruning and repair are in it; the script's
        begins once its images are decoded."""


def show_times(results: Results, found: dict[str, list[Found]]) -> None:
    base = statistics.median(run["seconds"] for run in found["plain script"])
    rows, ratios = [], {}
    for name, runs in found.items():
        median = statistics.median(run["seconds"] for run in runs)
        ratios[name] = median / base
        sparse = statistics.median(run["sparse_seconds"] for run in runs)
        accuracies = [run["accuracy"] for run in runs]
        each = ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
        rows.append([name, median, ratios[name], sparse, f"{statistics.mean(accuracies):.2%}", each])
    columns = ["", "seconds", "of the plain script's", "sparsity training, seconds", "accuracy", "of each seed"]
    results.table(columns, rows, "Seconds are medians over the seeds, accuracies means, after fine-tuning.")
    for name in ("netslim, in flight", "netslim"):
        results.headline(f"{name} / plain script, seconds", ratios[name])


def show_stages(results: Results, found: dict[str, list[Found]]) -> None:
    """Accuracy with and without slimming in flight at every ratio and stage, means over the seeds."""
    names, rows = ("netslim", "netslim, in flight"), []
    for ratio, stages in found[names[0]][0]["stages"].items():
        for stage in stages:
            means = [statistics.mean(run["stages"][ratio][stage]["accuracy"] for run in found[name]) for name in names]
            macs = [statistics.median(run["stages"][ratio][stage]["macs"] for run in found[name]) for name in names]
            rows.append(
                [
                    f"{stage}, {float(ratio):.0%} pruned"
                    if stage != "sparse"
                    else f"sparse, before {float(ratio):.0%}",
                    *(f"{mean:.2%}" for mean in means),
                    f"{100 * (means[1] - means[0]):+.2f}",
                    *map(int, macs),
                ]
            )
    columns = ["stage", "accuracy without", "in flight", "difference, points", "MACs without", "MACs in flight"]
    results.table(columns, rows, "Accuracies are means over the seeds.")


def show_epochs(results: Results, runs: list[Found]) -> None:
    """What an epoch of the training that gets smaller costs."""
    rows = []
    dense = runs[0]["epochs"][0]["macs"]
    spent = statistics.mean(line["macs"] / dense for run in runs for line in run["epochs"])
    for number, lines in enumerate(zip(*(run["epochs"] for run in runs), strict=True), 1):
        speed, gone, macs = (
            statistics.median(line[key] for line in lines) for key in ("images_per_second", "channels_gone", "macs")
        )
        rows.append([f"{number}", speed, int(gone), macs / dense])
    columns = ["epoch in flight", "images/s", "channels gone", "MACs, of the dense network's"]
    results.table(columns, rows, f"Medians over the seeds; {spent:.0%} of the dense training's MACs were spent.")


if __name__ == "__main__":
    main()
