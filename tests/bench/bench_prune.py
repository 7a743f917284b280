"""How long slimming takes once the weights are there, beside Torch-Pruning 1.6.1.

python tests/bench/bench_prune.py [--networks vgg19 resnet50 densenet121 densenet201] [--size 224] [--repeats 5]
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch_pruning
from results import Cell, Results, medians, new_parser, seconds, take_turns
from torch import Tensor, nn
from torchvision.models import get_model

from netslim.prune import cut, make_plan, map_channels
from netslim.train import ModelConfig, build_model

NETWORKS = ("vgg19", "resnet50", "densenet121", "densenet201")
RATIO = 0.5
ABOUT = f"""Channel map, plan and cut by netslim against building Torch-Pruning's pruner and its one step. Both remove
{RATIO:.0%} of the channels by one global threshold on |gamma|, at random gammas. Copying the network for each
repetition does not count, although the copy is part of netslim's cut, which leaves the model as it was. Both compute on
one thread: neither has much to compute, and more would only wait for whoever shares the cores."""

Slim = Callable[[nn.Module, Tensor], nn.Module]


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
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    torch_pruning.pruner.BNScalePruner(
        model,
        example,
        importance=torch_pruning.importance.BNScaleImportance(),
        global_pruning=True,
        pruning_ratio=RATIO,
        ignored_layers=last,
    ).step()
    return model


def measure(slim: Slim, model: nn.Module, example: Tensor) -> float:
    model = copy.deepcopy(model)
    return seconds(lambda: slim(model, example))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--size", type=int, default=224, help="pixels of ImageNet's images")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results("Pruning", ABOUT)
    rows: list[list[Cell]] = []
    ratios = []
    for name in options.networks:
        size = 32 if name == "vgg19" else options.size
        model, example = build(name), torch.randn(1, 3, size, size)
        contestants = {
            "netslim": partial(measure, netslim, model, example),
            "Torch-Pruning": partial(measure, torch_pruning_, model, example),
        }
        contestants["netslim"]()  # what only the first call in a process pays
        found = take_turns(contestants, options.repeats)
        middle = medians(found)
        ratios.append(middle["Torch-Pruning"] / middle["netslim"])
        for who, took in found.items():
            rows.append(
                [name, f"{size}x{size}", who, middle[who], min(took), max(took), middle[who] / middle["netslim"]]
            )
    results.table(
        ("network", "images", "by", "seconds", "least", "most", "time / netslim's"),
        rows,
        f"Medians of {options.repeats} repetitions.",
    )
    for name, ratio in zip(options.networks, ratios, strict=True):
        results.headline(f"Torch-Pruning / netslim, seconds for {name}", ratio)
    results.finish(options.json)


if __name__ == "__main__":
    main()
