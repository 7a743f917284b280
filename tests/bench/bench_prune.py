"""How long slimming takes once the weights are there: channel map, plan and cut, beside Torch-Pruning 1.6.1.

    python tests/bench/bench_prune.py [--networks vgg19 resnet50 densenet121 densenet201] [--size 224] [--repeats 5]

Both remove half of the channels by one global threshold on |gamma|, at random gammas. Building Torch-Pruning's pruner
counts, as the map does: both happen once per network. Copying the network for each repetition does not, although the
copy is part of netslim's cut, which leaves the model as it was. Repetitions are interleaved, so that a busy machine
slows all alike. Torch-Pruning needs minutes for densenet201; name the other networks to leave it out.
"""

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch_pruning
from torch import Tensor, nn
from torchvision.models import get_model

from netslim.prune import cut, make_plan, map_channels
from netslim.train import ModelConfig, build_model

NETWORKS = ("vgg19", "resnet50", "densenet121", "densenet201")
RATIO = 0.5


def build(name: str) -> nn.Module:
    """VGG-19 in its form for CIFAR, the others for ImageNet; with gammas of which half can go."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name), 10, 0) if name == "vgg19" else get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model.eval()


def netslim(model: nn.Module, example: Tensor) -> nn.Module:
    channels = map_channels(model, example)
    return cut(model, make_plan(channels.named_gammas(model), channels, ratio=RATIO))


def torch_pruning_(model: nn.Module, example: Tensor) -> nn.Module:
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    torch_pruning.pruner.BNScalePruner(
        model,
        example,
        importance=torch_pruning.importance.BNScaleImportance(),
        global_pruning=True,
        pruning_ratio=RATIO,
        ignored_layers=[last],
    ).step()
    return model


def seconds(slim: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, example: Tensor) -> float:
    model = copy.deepcopy(model)
    started = time.perf_counter()
    slim(model, example)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--size", type=int, default=224, help="pixels of ImageNet's images")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)  # neither has much to compute; more threads only wait for whoever shares the cores
    cores = len(os.sched_getaffinity(0))
    versions = f"torch {torch.__version__}, torch-pruning {version('torch-pruning')}"
    print(f"{platform.machine()}, {cores} cores, 1 thread, Python {platform.python_version()}, {versions}")
    print(f"ratio {RATIO}; medians of {args.repeats} interleaved repetitions, and their range")
    for name in args.networks:
        size = 32 if name == "vgg19" else args.size
        model, example = build(name), torch.randn(1, 3, size, size)
        seconds(netslim, model, example)  # what only the first call in a process pays
        times: dict[str, list[float]] = {"netslim": [], "torch-pruning": []}
        for _ in range(args.repeats):
            times["netslim"].append(seconds(netslim, model, example))
            times["torch-pruning"].append(seconds(torch_pruning_, model, example))
        report(name, size, times)


def report(name: str, size: int, times: dict[str, list[float]]) -> None:
    medians = {who: statistics.median(measured) for who, measured in times.items()}
    ranges = ", ".join(f"{who} {medians[who]:.3f} s ({min(t):.3f} to {max(t):.3f})" for who, t in times.items())
    ratio = medians["torch-pruning"] / medians["netslim"]
    print(f"{name:12} {size}x{size}: {ranges}; netslim is {ratio:.1f} times as fast", flush=True)


if __name__ == "__main__":
    sys.exit(main())
