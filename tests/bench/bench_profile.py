"""Where the time of a training step goes.

python tests/bench/bench_profile.py [--steps 10] [--rounds 3]
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, partialmethod, wraps
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from results import Cell, Results, new_parser
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function
from workers import Workers

from netslim.data import DataConfig, DataInfo, Shard, open_loaders, prepare
from netslim.train import FitConfig, ModelConfig, Record, Runtime, Saver, SparsityConfig, build_model
from netslim.train.loop import Training
from netslim.train.saved.progress import Progress

BATCH = 64
NETWORK = ModelConfig(name="vgg19", width=0.25)
ABOUT = f"""Training steps of netslim: {NETWORK.name} x {NETWORK.width:g}, batch {BATCH} of each process, 32x32,
float32, the digits through netslim's own loader, the gamma penalty by its subgradient; on the CPU every process has one
core and one thread. The times are torch.profiler's, of the thread that trains: of each operation, without those inside
it. An operation belongs to the range around it (the hooks of the optimizer: gamma update; its step; its zero_grad;
asking the loader), else to the node of autograd around it, else to the family of its name or of those around it, else
to metrics and the rest. What of a step is in no operation is Python, or on a GPU its idle time: so the parts add up to
the step."""
LOADING, BACKWARD, GAMMAS, TOGETHER = "ask the loader", "call backward", "update gammas", "sum over ranks"
FAMILIES = {
    "convolution": ("conv",),
    "batch norm": ("batch_norm", "batchnorm"),
    "ReLU and pooling": ("relu", "threshold", "pool", "meanbackward"),
    "linear and loss": ("linear", "addmm", "cross_entropy", "logsoftmax", "log_softmax", "nllloss"),
}
LOOK = ("foreach_norm", "stack", "isfinite", "aten::all", "bitwise_not")
CLASSES = (
    *(f"forward: {family}" for family in FAMILIES),
    *(f"backward: {family}" for family in FAMILIES),
    "backward: the rest",
    "backward: between nodes; waits for all-reduces",
    "all-reduce: start it; agree on stops",
    "look whether gradients are finite",
    "optimizer step",
    "gamma update",
    "set gradients to zero",
    "loader: move and normalise",
    "loader: wait for images",
    "metrics and the rest",
    "in no operation: Python",
)


@dataclass(frozen=True)
class Profile:
    """What some steps took, in seconds a step."""

    parts: dict[str, float]
    """By class; they add up to the step."""
    step: float
    plain_step: float
    """Without the profiler."""


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a range of that name."""

    @wraps(function)
    def inside(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return inside


class Batches:
    """The loader's batches, of any number of epochs; the clock, and a profiler, start after the first."""

    def __init__(self, info: DataInfo, config: DataConfig, run: Runtime) -> None:
        self._device = run.device
        shard = Shard(run.rank, run.world_size)
        self._loader = open_loaders(config, info, shard, seed=0, device=run.device).train
        self._endless = itertools.chain.from_iterable(map(self._loader.epoch, itertools.count()))
        self.steps = 0
        self.profiler: profile | None = None
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        started = 0.0
        for number in range(1 + self.steps):
            if number == 1:
                if self.profiler is not None:
                    self.profiler.start()
                started = self._now()
            with record_function(LOADING):
                batch = next(self._endless)
            yield batch
        self.seconds = self._now() - started
        if self.profiler is not None:
            self.profiler.stop()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter()


class Profiled:
    """A process that trains under the profiler, which is all that it is for: it gives ranges to what has none."""

    def __init__(self, run: Runtime) -> None:
        self.run: Any = run
        self.run.backward = ranged(BACKWARD, run.backward)
        self.run.sum_over_ranks = ranged(TOGETHER, run.sum_over_ranks)
        for register in (Optimizer.register_step_pre_hook, Optimizer.register_step_post_hook):
            setattr(Optimizer, register.__name__, partialmethod(_register_ranged, register))

    def measure(self, info: DataInfo, config: DataConfig, steps: int, rounds: int) -> Profile:
        """Profile the steps of some rounds, each beside as many without the profiler."""
        run = self.run
        batches = Batches(info, replace(config, batch_size=BATCH * run.world_size), run)
        model = build_model(NETWORK, num_classes=10, seed=0)
        gammas = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        fit = FitConfig(lr=1e-3, schedule="constant")
        record = Record("bench", Path(), is_main=False)
        training = Training(model, batches, fit, run, record, gammas, SparsityConfig())

        def train() -> float:
            training.train_epoch(Progress(), Saver(None, run))
            return batches.seconds / steps

        batches.steps = steps
        train()
        found: defaultdict[str, float] = defaultdict(float)
        for _ in range(rounds):
            batches.profiler = None
            found["plain step"] += train() / rounds
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])]
            batches.profiler = profile(activities=activities)
            found["step"] += train() / rounds
            for name, seconds in spent(batches.profiler, run.device).items():
                found[name] += seconds / (steps * rounds)
        parts = {name: found[name] for name in CLASSES}
        parts[CLASSES[-1]] = found["step"] - sum(parts.values())
        return Profile(parts, found["step"], found["plain step"])


def _register_ranged(optimizer: Optimizer, register: Callable[..., Any], hook: Callable[..., Any]) -> Any:
    return register(optimizer, ranged(GAMMAS, hook))


def spent(profiler: profile, device: torch.device) -> dict[str, float]:
    """Seconds of each class: of the thread that trains, or of the GPU's kernels."""
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU and not event.is_async]
    trains = {event.thread for event in events if event.name == LOADING}
    found: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.name == "DistributedDataParallel.forward":
            continue  # of its own it has Python only
        if device.type == "cuda":
            found[class_of(event)] += sum(kernel.duration for kernel in event.kernels) / 1e6
        elif event.thread in trains:
            found[class_of(event)] += event.self_cpu_time_total / 1e6
    return found


def class_of(event: FunctionEvent) -> str:
    """What an operation is for: by the ranges and operations around it, outermost first."""
    names: list[str] = []
    around: FunctionEvent | None = event
    while around is not None:
        names.insert(0, around.name)
        around = around.cpu_parent
    if TOGETHER in names or any(part in name for name in names for part in ("c10d::", "gloo:", "nccl:")):
        return "all-reduce: start it; agree on stops"
    if GAMMAS in names:
        return "gamma update"
    if any(name.startswith("Optimizer.step") for name in names):
        return "optimizer step"
    if any(name.startswith("Optimizer.zero_grad") for name in names):
        return "set gradients to zero"
    if LOADING in names:
        return "loader: wait for images" if names[-1] == LOADING else "loader: move and normalise"
    if names == [BACKWARD]:
        return "backward: between nodes; waits for all-reduces"
    is_backward = any(name.startswith("autograd::") for name in names) or BACKWARD in names
    if not is_backward and any(part in names[0] for part in LOOK):
        return "look whether gradients are finite"
    for name in names:
        for family, parts in FAMILIES.items():
            if any(part in name.lower() for part in parts):
                return f"{'backward' if is_backward else 'forward'}: {family}"
    return "backward: the rest" if is_backward else "metrics and the rest"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says of every start and stop that it was one
    results = Results("Where a step's time goes", ABOUT)
    config = DataConfig()
    arguments = (prepare(config, quiet=True), config, options.steps, options.rounds)
    places = {
        "one process": partial(Workers, Profiled, 1),
        "one of two processes": partial(Workers, Profiled, 2, grouped=True),
    }
    if torch.cuda.is_available():
        places["one GPU"] = partial(Workers, Profiled, 1, cpu=False)
    found: dict[str, Profile] = {}
    for place, start in places.items():
        with start() as workers:
            found[place] = workers.do(Profiled.measure, *arguments)[0]
    alone = found["one process"]
    results.headline("gamma update, share of a step", alone.parts["gamma update"] / alone.step)
    rows: list[list[Cell]] = []
    for name in CLASSES:
        rows.append([name])
        for each in found.values():
            rows[-1] += [1e3 * each.parts[name], 100 * each.parts[name] / each.step]
    whole: list[Cell] = ["whole step"]
    plain: list[Cell] = ["the same without the profiler"]
    for each in found.values():
        whole += [1e3 * each.step, 100.0]
        plain += [1e3 * each.plain_step, 100 * each.plain_step / each.step]
    results.table(
        ["part", *(column for place in found for column in (f"{place}, ms", "%"))],
        [*rows, whole, plain],
        f"Means of {options.rounds} rounds of {options.steps} steps. The profiler itself takes time in every "
        "operation, most of all in the small ones.",
    )
    results.finish(options.json)


if __name__ == "__main__":
    main()
