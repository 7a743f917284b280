"""The lab report that netslim began with, measured again: what its page, docs/lab.md, shows.

    make lab FLAGS='--root ~/cifar10'                                             folders of images
    make lab FLAGS='--root ~/data -- --data.source cifar10 --data.download'       the originals
    python tests/bench/lab.py --root DIR [options] [-- any netslim flag ...]

Without flags for netslim it is the paper's training at full width, which wants a GPU.

For each lambda VGG-19 is sparsified once and cut at each ratio in two ways: by |gamma|, as the report did, and by what
reconstruction cannot restore (`--prune.score reconstruction`). Both are repaired. For the lambdas of --finetune the
networks are fine-tuned too, for equal epochs, from the cut and from the repaired network. Runs that are complete are
not made again. The figures go to docs/ as pictures, the tables between the marks of docs/lab.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file

from netslim.launch.run.directory import read_json

PRESET = "lab-vgg19-cifar10"
PAGE = Path(__file__).parents[2] / "docs" / "lab.md"
MARKS = ("<!-- made by tests/bench/lab.py: begin -->", "<!-- made by tests/bench/lab.py: end -->")
SCORES = {"gamma": "by gamma", "reconstruction": "by reconstruction"}
COLOURS = ("#444444", "#2364aa", "#3da35d", "#e0a030", "#b0413e", "#7d3c98")


def run_directory(runs: Path, weight: str, score: str) -> Path:
    return runs / f"lambda-{weight}-{score}"


def make_runs(options: argparse.Namespace) -> None:
    """Everything that the page needs, by the command netslim."""
    for weight in options.weights:
        sparse = run_directory(options.runs, weight, "gamma") / "sparse"
        for score in SCORES:
            directory = run_directory(options.runs, weight, score)
            flags = [
                *("--run-dir", directory, "--sparsity.weight", weight, "--prune.score", score, "--prune.ratio"),
                *(*options.ratios, "--data.source", "folder", "--data.root", options.root),
                *("--finetune.start", "slim", "cut", "--record.wandb", "disabled", *options.flags),
            ]
            if score == "gamma":
                netslim("sparsify", flags)
            elif not (directory / "sparse").exists():
                shutil.copytree(sparse, directory / "sparse", ignore=shutil.ignore_patterns("checkpoints"))
            for command in ("prune", "repair", *(["finetune"] if weight in options.finetune else [])):
                netslim(command, flags)


def netslim(command: str, flags: Sequence[object]) -> None:
    line = [str(Path(sys.executable).with_name("netslim")), command, PRESET, *map(str, flags)]
    print("$", " ".join(line), flush=True)
    subprocess.run(line, check=True)


def metrics(directory: Path) -> dict[str, Any]:
    """What a stage measured; empty where there is none."""
    return read_json(directory / "metrics.json") if (directory / "metrics.json").is_file() else {}


def stage(name: str, ratio: float) -> str:
    return f"{name}-{ratio:.2f}"


def gammas(directory: Path) -> NDArray[np.float32]:
    """All |gamma| of a sparse model."""
    weights = load_file(directory / "weights.safetensors")
    norms = [name.removesuffix(".running_mean") for name in weights if name.endswith(".running_mean")]
    return np.abs(np.concatenate([weights[f"{name}.weight"] for name in norms]))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def percent(values: dict[str, Any], key: str = "accuracy") -> str:
    return f"{values[key]:.2%}".replace("%", " %") if values else "not run"


def sparse_table(options: argparse.Namespace) -> str:
    head = ["lambda", "sparse model", "median gamma", "gammas < 0.01", "ratio", "cut", "cut, repaired"]
    head += ["cut by reconstruction, repaired"]
    lines = [head]
    for weight in options.weights:
        by_gamma, by_loss = (run_directory(options.runs, weight, score) for score in SCORES)
        sparse = metrics(by_gamma / "sparse")
        for number, ratio in enumerate(options.ratios):
            first = [weight, percent(sparse), f"{sparse['gamma_median']:.3f}", percent(sparse, "gamma_below_1e-2")]
            lines.append(
                [
                    *(first if number == 0 else [""] * len(first)),
                    f"{ratio:.0%}".replace("%", " %"),
                    percent(metrics(by_gamma / stage("prune", ratio))),
                    percent(metrics(by_gamma / stage("repair", ratio))),
                    percent(metrics(by_loss / stage("repair", ratio))),
                ]
            )
    return markdown(lines)


def finetuned_table(options: argparse.Namespace) -> str:
    lines = [
        ["lambda", "ratio", "cut", "parameters", "MACs", "file, MB", "fine-tuned from the cut", "from the repaired"]
    ]
    for weight in options.finetune:
        for ratio in options.ratios:
            for score, words in SCORES.items():
                directory = run_directory(options.runs, weight, score)
                small = metrics(directory / stage("prune", ratio))
                first = [weight, f"{ratio:.0%}".replace("%", " %"), words]
                sizes = [f"{small['params']:,}", f"{small['macs']:,}", f"{small['file_mb']:.3f}"]
                starts = [percent(metrics(directory / stage(name, ratio))) for name in ("finetune-cut", "finetune")]
                lines.append([*first, *sizes, *starts])
    return markdown(lines)


def draw_training(options: argparse.Namespace, axes: Axes) -> None:
    for weight, colour in zip(options.weights, COLOURS, strict=False):
        path = run_directory(options.runs, weight, "gamma") / "sparse" / "metrics.jsonl"
        values = [100 * json.loads(line)["accuracy"] for line in path.read_text(encoding="utf-8").splitlines()]
        axes.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=3, label=f"lambda {weight}")
    axes.set(xlabel="epoch of sparsity training", ylabel="test accuracy, %", title="Sparsity training")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_gammas(options: argparse.Namespace, axes: Axes) -> None:
    found = {weight: gammas(run_directory(options.runs, weight, "gamma") / "sparse") for weight in options.weights}
    edges = np.linspace(0, np.quantile(np.concatenate(list(found.values())), 0.995), 61)
    for (weight, values), colour in zip(found.items(), COLOURS, strict=False):
        counts = np.histogram(values, edges)[0]
        axes.stairs(100 * counts / len(values), edges, color=colour, linewidth=1.6, label=f"lambda {weight}")
    axes.set(xlabel="|gamma|", ylabel="share of all channels, %", title="Scales at the end of sparsity training")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_pruning(options: argparse.Namespace, axes: Axes) -> None:
    groups = [(weight, ratio) for weight in options.weights for ratio in options.ratios]
    bars = [("cut by |gamma|", "gamma", "prune", "#b0413e"), ("the same, repaired", "gamma", "repair", "#5a93c8")]
    bars += [("cut by reconstruction, repaired", "reconstruction", "repair", "#1b4f8a")]
    for number, (label, score, name, colour) in enumerate(bars):
        heights = [
            100 * metrics(run_directory(options.runs, weight, score) / stage(name, ratio))["accuracy"]
            for weight, ratio in groups
        ]
        shown = axes.bar(np.arange(len(groups)) + 0.28 * (number - 1), heights, 0.26, color=colour, label=label)
        axes.bar_label(shown, fmt="%.0f", fontsize=8, label_type="center", color="white")
    sparse = [
        100 * metrics(run_directory(options.runs, weight, "gamma") / "sparse")["accuracy"] for weight, _ in groups
    ]
    where = np.arange(len(groups))
    axes.hlines(sparse, where - 0.45, where + 0.45, color="#444444", linestyle=":", label="sparse model")
    axes.set_xticks(where, [f"{weight}\n{ratio:.0%}" for weight, ratio in groups])
    axes.set(xlabel="lambda, ratio of channels removed", ylabel="test accuracy, %", ylim=(0, 105))
    axes.set_title("Right after pruning: no training step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)


def draw(options: argparse.Namespace) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_training(options, left)
    draw_gammas(options, right)
    figure.savefig(PAGE.with_name("lab-training.png"), dpi=110)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    draw_pruning(options, figure.subplots())
    figure.savefig(PAGE.with_name("lab-pruning.png"), dpi=110)


def about(options: argparse.Namespace) -> str:
    """What the figures were measured on, and by which command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "accelerate"))
    command = ["make lab FLAGS='--root DIR", *("--weights", *options.weights), *("--ratios", *map(str, options.ratios))]
    command += [*("--finetune", *options.finetune), "--", *options.flags]
    return (
        f"Data: {options.data}. Hardware: {device} ({platform.machine()}); {versions}. One seed. Command:\n\n"
        f"```\n{' '.join(command)}'\n```"
    )


def write_page(options: argparse.Namespace) -> None:
    parts = [about(options), "![Accuracy over epochs, and scales at the end](lab-training.png)"]
    parts += [sparse_table(options), "![Accuracy right after pruning](lab-pruning.png)", finetuned_table(options)]
    begin, end = MARKS
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    text = "\n\n".join(parts)
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="CIFAR-10 as folders: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--data", default="CIFAR-10", help="what the page calls the data")
    parser.add_argument("--weights", nargs="+", default=["0", "1e-5", "1e-4"], help="lambdas")
    parser.add_argument("--finetune", nargs="*", default=["1e-5", "1e-4"], help="lambdas after which to fine-tune")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"))
    options = parser.parse_args(arguments[:cut])
    options.flags = arguments[cut + 1 :]
    make_runs(options)
    draw(options)
    write_page(options)


if __name__ == "__main__":
    main()
