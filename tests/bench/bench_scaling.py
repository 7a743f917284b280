"""How training scales from one process to two, and what the formula of a ring says of up to 64 GPUs.

python tests/bench/bench_scaling.py [--images-per-second 10000 50000] [--gpu-batch 256]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from results import Cell, Results, medians, new_parser, take_turns
from torch import Tensor, distributed, nn
from workers import Workers

from netslim.train import FitConfig, ModelConfig, Record, Runtime, Saver, SparsityConfig, build_model
from netslim.train.loop import Training
from netslim.train.saved.progress import Progress

ABOUT = """Training steps of netslim (DDP through Accelerate, gloo, the gamma penalty by its subgradient, random images
in memory, 32x32, float32) in processes with a core of their own and one thread. All ways to run take turns, and figures
are medians; processes start once, and the clock runs after a warm-up step of each turn. Two processes that know nothing
of each other, side by side, show what sharing caches and memory costs: what DDP is slower than these is what
communication costs. The prediction is T(n) = T(1) + what is left of the all-reduces when the backward pass ends, and
the efficiency T(1) / T(n). DDP reduces gradients in buckets, one after another, each as soon as its last gradient is
there; when that is was measured here. A ring takes 2 (n - 1) / n x bytes / bandwidth + 2 (n - 1) x latency for each."""
BATCH = 64
GPUS = (1, 2, 4, 8, 16, 32, 64)
PER_NODE = 8


class Network(NamedTuple):
    name: str
    width: float
    steps: int
    """In a turn, after one that warms up."""
    repetitions: int


NETWORKS = (Network("vgg19", 0.25, 10, 15), Network("vgg19", 1.0, 2, 9), Network("preresnet20", 1.0, 4, 11))


class Bucket(NamedTuple):
    """Gradients that are reduced together."""

    num_bytes: int
    before_end: float
    """From when they are all there to the end of the backward pass, as a share of the step."""


class Batches:
    """The same random images at every step; the clock starts after the first, which warms up."""

    def __init__(self, run: Runtime) -> None:
        generator = torch.Generator().manual_seed(run.rank)
        images = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
        self.images, self.labels = images, torch.randint(0, 10, (BATCH,), generator=generator)
        self.batch = self.steps = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        return 1000  # that an epoch never comes to

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        started = 0.0
        for number in range(1 + self.steps):
            if number == 1:
                started = time.perf_counter()
            yield self.images[: self.batch], self.labels[: self.batch]
        self.seconds = time.perf_counter() - started


class Trainer:
    """What a process has: its trainings, by network and by whether gammas are penalised."""

    def __init__(self, run: Runtime) -> None:
        self.run, self.batches = run, Batches(run)
        self.trainings: dict[tuple[str, float, bool], Training] = {}

    def take_steps(self, network: Network, batch: int, sparse: bool = True) -> float:
        """Seconds for the steps of a turn."""
        return self._train(self._training(network, sparse), batch, network.steps)

    def time_buckets(self, network: Network) -> list[Bucket]:
        """When each bucket of DDP is complete, medians over steps in which nothing is reduced."""
        seen: list[tuple[float, bool, int]] = []

        def note(_: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
            size = bucket.buffer().numel() * bucket.buffer().element_size()
            seen.append((time.perf_counter(), bucket.is_last(), size))
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        training = self._new_training(network, sparse=True)
        training.wrapped.register_comm_hook(None, note)
        self._train(training, BATCH, 1)  # after which DDP orders its buckets anew
        seen.clear()
        steps = 2 + network.steps
        step_seconds = self._train(training, BATCH, steps - 1) / (steps - 1)
        num = len(seen) // steps
        assert [is_last for _, is_last, _ in seen] == ([False] * (num - 1) + [True]) * steps
        rounds = [seen[start : start + num] for start in range(0, len(seen), num)]
        return [
            Bucket(size, statistics.median(times[-1][0] - times[index][0] for times in rounds) / step_seconds)
            for index, (_, _, size) in enumerate(rounds[0])
        ]

    def reduce(self, sizes: Sequence[int]) -> float:
        """Seconds for the all-reduces of a step, of so many bytes each, and nothing else."""
        gradients = [torch.ones(size // 4) for size in sizes]
        distributed.all_reduce(torch.zeros(1))  # so that all begin together
        started = time.perf_counter()
        for work in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        return time.perf_counter() - started

    def forget(self) -> None:
        self.trainings.clear()
        self.run.release()

    def _train(self, training: Training, batch: int, steps: int) -> float:
        self.batches.batch, self.batches.steps = batch, steps
        training.train_epoch(Progress(), Saver(None, self.run))
        return self.batches.seconds

    def _training(self, network: Network, sparse: bool) -> Training:
        key = (network.name, network.width, sparse)
        if key not in self.trainings:
            self.trainings[key] = self._new_training(network, sparse)
        return self.trainings[key]

    def _new_training(self, network: Network, sparse: bool) -> Training:
        model = build_model(ModelConfig(name=network.name, width=network.width), num_classes=10, seed=0)
        gammas = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        config = FitConfig(lr=1e-3, schedule="constant")
        record = Record("bench", Path(), is_main=False)
        return Training(model, self.batches, config, self.run, record, gammas, SparsityConfig() if sparse else None)


@dataclass(frozen=True)
class Found:
    """What was measured of one network."""

    network: Network
    turns: dict[str, list[float]]
    """Images/s of all processes of a way to run, in each turn."""
    buckets: list[Bucket]
    reduce_seconds: float

    @property
    def speeds(self) -> dict[str, float]:
        return medians(self.turns)

    def spread(self, way: str, other: str, factor: float = 1.0) -> str:
        """The least and the greatest of factor x way / other within a turn."""
        ratios = [factor * a / b for a, b in zip(self.turns[way], self.turns[other], strict=True)]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    @property
    def label(self) -> str:
        return f"{self.network.name} x {self.network.width:g}"


def measure(network: Network, apart: Workers, group: Workers) -> Found:
    """Let every way to run this network take turns."""

    def speed(workers: Workers, batch: int, *, sparse: bool = True, count: int = 2) -> float:
        seconds = workers.do(Trainer.take_steps, network, batch, sparse, count=count)
        return sum(batch * network.steps / each for each in seconds)

    buckets = group.do(Trainer.time_buckets, network)[0]
    sizes = [bucket.num_bytes for bucket in buckets]
    contestants: dict[str, Callable[[], float]] = {
        "alone": partial(speed, apart, BATCH, count=1),
        "side by side": partial(speed, apart, BATCH),
        "ddp": partial(speed, group, BATCH),
        "ddp, no penalty": partial(speed, group, BATCH, sparse=False),
        "side by side, half a batch": partial(speed, apart, BATCH // 2),
        "ddp, half a batch": partial(speed, group, BATCH // 2),
        "reduce": lambda: max(group.do(Trainer.reduce, sizes)),
    }
    turns = take_turns(contestants, network.repetitions, warm_up=1)
    for workers in (apart, group):
        workers.do(Trainer.forget)
    reduce_seconds = statistics.median(turns.pop("reduce"))
    return Found(network, turns, buckets, reduce_seconds)


def exposed(ready: Sequence[float], seconds: Sequence[float]) -> float:
    """How long buckets are still reduced after the backward pass, one after another.

    Each takes ``seconds``, and is ``ready`` so long before the end of backward; in the order in which they are ready.
    """
    return max(sum(seconds[first:]) - before_end for first, before_end in enumerate(ready))


def ring(num_bytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Seconds of a ring's all-reduce; bytes/s and seconds."""
    return 2 * (ranks - 1) / ranks * num_bytes / bandwidth + 2 * (ranks - 1) * latency


@dataclass(frozen=True)
class Links:
    """How GPUs reach each other: a ring is as fast as its slowest link."""

    node_bandwidth: float
    node_latency: float
    net_bandwidth: float
    net_latency: float

    def seconds(self, buckets: Sequence[Bucket], ranks: int, bytes_per_gradient: int) -> list[float]:
        """What reducing each bucket takes."""
        link = (self.node_bandwidth, self.node_latency)
        if ranks > PER_NODE:
            link = (self.net_bandwidth, self.net_latency)
        return [ring(bucket.num_bytes * bytes_per_gradient / 4, ranks, *link) for bucket in buckets]


def efficiency(buckets: Sequence[Bucket], step_seconds: float, seconds: Sequence[float]) -> float:
    """T(1) / T(n), where reducing the buckets takes ``seconds``."""
    return step_seconds / (step_seconds + exposed([step_seconds * bucket.before_end for bucket in buckets], seconds))


def least_step(buckets: Sequence[Bucket], seconds: Sequence[float], wanted: float) -> float:
    """The shortest step, in seconds, whose efficiency is still as ``wanted``: `efficiency` solved for the step."""
    allowed = 1 / wanted - 1
    return max(sum(seconds[first:]) / (allowed + bucket.before_end) for first, bucket in enumerate(buckets))


def show_scaling(results: Results, everything: Sequence[Found]) -> None:
    rows: list[list[Cell]] = []
    for found in everything:
        for kind, batch, suffix in (("weak", BATCH, ""), ("strong", BATCH // 2, ", half a batch")):
            alone, beside = found.speeds["alone"], found.speeds[f"side by side{suffix}"]
            ddp = found.speeds[f"ddp{suffix}"]
            spread = found.spread(f"ddp{suffix}", "alone", 0.5)
            rows.append([found.label, kind, batch, alone, beside, ddp, ddp / (2 * alone), spread, ddp / beside])
            if kind == "weak":
                results.headline(f"efficiency of 2 processes, {found.label}, weak scaling", ddp / (2 * alone))
    results.table(
        [
            *("network", "scaling", "batch of each", "images/s, 1", "2 apart", "2 by DDP", "efficiency"),
            *("in single turns", "DDP / apart"),
        ],
        rows,
        f"images/s: of one process with a batch of {BATCH}; of two that do not communicate, side by side; of two by "
        "DDP. Efficiency: 2 by DDP / (2 x 1). DDP / apart: what communication leaves of it; the rest is caches and "
        "memory that the two cores share.",
    )


def show_penalty(results: Results, everything: Sequence[Found]) -> None:
    rows: list[list[Cell]] = []
    for found in everything:
        plain, sparse = (2e3 * BATCH / found.speeds[way] for way in ("ddp, no penalty", "ddp"))
        rows.append([found.label, plain, sparse, sparse / plain, found.spread("ddp, no penalty", "ddp")])
    results.table(
        ["network, 2 processes", "ms/step without penalty", "with", "ratio", "in single turns"],
        rows,
        "The penalty joins the gradients after they are reduced, in the optimizer's step, so that reducing them "
        "overlaps with backward as without it.",
    )


def show_formula(results: Results, everything: Sequence[Found]) -> None:
    rows: list[list[Cell]] = []
    for found in everything:
        step = 2 * BATCH / found.speeds["side by side"]
        total = sum(bucket.num_bytes for bucket in found.buckets)
        seconds = [found.reduce_seconds * bucket.num_bytes / total for bucket in found.buckets]
        hidden = step + exposed([step * bucket.before_end for bucket in found.buckets], seconds)
        measured = 2 * BATCH / found.speeds["ddp"]
        times = (found.reduce_seconds, step, hidden, step + found.reduce_seconds, measured)
        sizes = " + ".join(f"{bucket.num_bytes / 1e6:.3g}" for bucket in found.buckets)
        shares = " ".join(f"{100 * bucket.before_end:.0f}" for bucket in found.buckets)
        rows.append([found.label, sizes, shares, *(1e3 * each for each in times)])
    results.table(
        [
            *("network", "buckets, MB", "ready before the end, % of a step", "all-reduce alone, ms"),
            *("step apart, ms", "predicted, overlapped", "predicted, not overlapped", "measured"),
        ],
        rows,
        "The formula for two processes here: the step of two that do not communicate, and the same all-reduces by "
        "gloo, measured with nothing beside them. Not overlapped is what to expect of a process with one core, which "
        "itself copies and adds what it sends; a GPU leaves most of that to its links.",
    )


def show_prediction(results: Results, everything: Sequence[Found], options: argparse.Namespace) -> None:
    node = (options.node_bandwidth * 1e9, options.node_latency * 1e-6)
    links = Links(*node, options.net_bandwidth * 1e9, options.net_latency * 1e-6)
    rows: list[list[Cell]] = []
    for found in everything:
        cases = [("measured here, one core", BATCH, found.speeds["alone"])]
        cases += [("given", options.gpu_batch, each) for each in options.images_per_second]
        for source, batch, speed in cases:
            for gradients, size in (("float32", 4), ("bf16", 2)):
                times = {ranks: links.seconds(found.buckets, ranks, size) for ranks in GPUS}
                shares = [1.0 if n == 1 else efficiency(found.buckets, batch / speed, times[n]) for n in GPUS]
                most = batch / least_step(found.buckets, times[GPUS[-1]], 0.9)
                rows.append([found.label, f"{_round(speed)}, {source}", batch, gradients, *shares, _round(most)])
    results.table(
        [
            *("network", "images/s of each", "batch of each", "gradients", *map(str, GPUS)),
            f"images/s of each up to which {GPUS[-1]} keep 0.9",
        ],
        rows,
        f"PREDICTED, NOT MEASURED: the efficiency of so many GPUs, weak scaling. {options.node_bandwidth:g} GB/s "
        f"within a node of {PER_NODE} (NVLink) and {options.net_bandwidth:g} GB/s a GPU between nodes (InfiniBand "
        f"NDR) are the vendors' nominal figures; the latencies, {options.node_latency:g} and "
        f"{options.net_latency:g} us for each step of a ring, are assumed, and so is that buckets are complete at the "
        "same shares of a step as on this CPU, and that links work beside computing. What turning gradients to bf16 "
        "takes is left out. Given images/s are assumed too. The last column is proportional to the batch.",
    )


def _round(value: float) -> str:
    """Two digits: what an estimate is worth."""
    unit = 10 ** (math.floor(math.log10(value)) - 1)
    return f"{round(value / unit) * unit:,.0f}"


def main() -> None:
    parser = new_parser(__doc__)
    add = partial(parser.add_argument, type=float)
    add("--images-per-second", nargs="*", default=[10e3, 50e3], help="of one GPU, for the prediction")
    parser.add_argument("--gpu-batch", type=int, default=256, help="images of one GPU in a step, for the prediction")
    add("--node-bandwidth", default=450.0, help="GB/s of a GPU to those of its node; NVLink 4 nominally")
    add("--node-latency", default=2.0, help="microseconds of a step of the ring within a node")
    add("--net-bandwidth", default=50.0, help="GB/s of a GPU to other nodes; InfiniBand NDR nominally")
    add("--net-latency", default=5.0, help="microseconds of a step of the ring between nodes")
    options = parser.parse_args()
    results = Results("Scaling", ABOUT)
    with Workers(Trainer, 2) as apart, Workers(Trainer, 2, grouped=True) as group:
        everything = [measure(network, apart, group) for network in NETWORKS]
    show_scaling(results, everything)
    show_penalty(results, everything)
    show_formula(results, everything)
    show_prediction(results, everything, options)
    results.finish(options.json)


if __name__ == "__main__":
    main()
