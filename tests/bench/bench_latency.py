"""What slimming saves in time: latency of dense and slim networks beside their multiply-accumulates.

python tests/bench/bench_latency.py [--networks vgg19 preresnet164 densenet40] [--ratio 0.5] [--seconds 2]
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from results import Cell, Results, medians, new_parser, seconds, take_turns
from torch import Tensor, nn

from netslim.prune import cost, export, slim
from netslim.train import ModelConfig, build_model

NETWORKS = ("vgg19", "preresnet164", "densenet40")
BATCHES = (1, 64)
DENSE, COMPILE = "dense", "torch.compile"
ROUNDINGS = {"slim": 1, "slim, round_to 16": 16}
ABOUT = """Inference of the dense network, of the slim one, and of one whose layers keep multiples of 16 channels
(`round_to`), which hardware prefers; / dense compares each with the dense network in the same runtime. Weights are
random, and so are the gammas, uniform in [0, 1] by a seed: in a trained network other layers lose more, so that what
to read is how latency follows the multiply-accumulates (MACs). 32x32 images, float32; eager and torch.compile as they
come, ONNX Runtime on what `netslim.prune.export` writes, BatchNorm folded. The three forms take turns."""

Call = Callable[[], object]
Runtime = Callable[[nn.Module, Tensor], Call]


def networks(name: str, ratio: float, images: Tensor) -> dict[str, nn.Module]:
    """The network's three forms."""
    dense = build_model(ModelConfig(name=name), num_classes=10, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=generator)
    slimmed = {form: slim(dense, images, ratio=ratio, round_to=to)[0].eval() for form, to in ROUNDINGS.items()}
    return {DENSE: dense, **slimmed}


def eager(model: nn.Module, images: Tensor) -> Call:
    return lambda: model(images)


def compiled(model: nn.Module, images: Tensor) -> Call:
    run = torch.compile(model, dynamic=False)  # which happens in the first call
    return lambda: run(images)


def onnx(model: nn.Module, images: Tensor) -> Call:
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.onnx"
        export(model, images[:1], file, "onnx")
        session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    batch = images.numpy()
    return lambda: session.run(None, {"images": batch})


def runtimes() -> tuple[dict[str, Runtime | None], list[str]]:
    """How a network can be run, None where it cannot here, and what is missing."""
    packages = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    lacks = [] if compiler else ["torch.compile needs a C++ compiler, and there is none."]
    if packages:
        lacks.append(f"ONNX Runtime needs {', '.join(packages)}: not installed.")
    found = {
        "eager": eager,
        COMPILE: compiled if compiler else None,
        "ONNX Runtime": None if packages else onnx,
    }
    return found, lacks


def milliseconds(calls: dict[str, Call], budget: float) -> dict[str, float]:
    """Median time of a call of each, in about so many seconds for all."""
    for call in calls.values():
        call()
    once = sum(seconds(call) for call in calls.values())
    repetitions = max(5, min(300, round(budget / once)))
    turns = {form: partial(seconds, call) for form, call in calls.items()}
    return {form: 1e3 * took for form, took in medians(take_turns(turns, repetitions, warm_up=2)).items()}


def measure(
    models: dict[str, nn.Module], images: Tensor, how: Runtime | None, budget: float
) -> dict[str, float | None]:
    if how is None:
        return dict.fromkeys(models)
    torch._dynamo.reset()  # all share one code object, of which torch keeps few variants
    calls = {form: how(model, images) for form, model in models.items()}
    with torch.inference_mode():
        return {**milliseconds(calls, budget)}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument(
        "--compile", nargs="*", choices=NETWORKS, default=["vgg19"], help="by torch: minutes for each deep network"
    )
    parser.add_argument("--seconds", type=float, default=2, help="for each network, batch size and runtime")
    options = parser.parse_args()
    results = Results("Latency", ABOUT)
    how, lacks = runtimes()
    if set(options.networks) - set(options.compile):
        lacks.append("torch.compile takes minutes for each deep network; --compile names those that it is measured of.")
    torch.manual_seed(0)
    largest = torch.randn(max(BATCHES), 3, 32, 32)
    rows: dict[int, list[list[Cell]]] = {batch: [] for batch in BATCHES}
    for name in options.networks:
        models = networks(name, options.ratio, largest[:2])
        ways = {way: run if way != COMPILE or name in options.compile else None for way, run in how.items()}
        macs = {form: cost(model, largest[:1]).macs for form, model in models.items()}
        for batch in BATCHES:
            found = {way: measure(models, largest[:batch], run, options.seconds) for way, run in ways.items()}
            for form in models:
                pairs = [(took[form], took[DENSE]) for took in found.values()]
                times = [cell for here, dense in pairs for cell in (here, here / dense if here and dense else None)]
                rows[batch].append([name, form, macs[form] / 1e6, macs[form] / macs[DENSE], *times])
    columns = ("network", "form", "MACs, M", "/ dense", *(c for way in how for c in (f"{way}, ms", "/ dense")))
    for batch in BATCHES:
        note = f"Batch {batch}, ratio {options.ratio} of the channels, {torch.get_num_threads()} threads."
        results.table(columns, rows[batch], " ".join([note, *lacks]))
    for row in rows[max(BATCHES)]:
        if row[1] == "slim":
            results.headline(f"slim / dense in eager at batch {max(BATCHES)}, {row[0]} (MACs {row[3]:.2f})", row[5])
    results.finish(options.json)


if __name__ == "__main__":
    main()
