"""One GPU: training steps, loaders, slimming in flight, latency, and the time to a fine-tuned slim VGG-19.

python tests/bench/bench_gpu.py [--minutes 9] [--json FILE]
python tests/bench/bench_gpu.py --full                     all 200 epochs of the way to a slim VGG-19, and nothing else
python tests/bench/bench_gpu.py --cpu --tiny --minutes 1   every section in miniature, without a GPU

Needs neither an installation nor FFCV. Each figure is printed as a line of JSON as soon as it is there, so that a run
which is cut off loses none; it ends by itself before the minutes are over.
"""

import copy
import gc
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from results import Cell, Results, new_parser
from torch import Tensor, nn

try:
    import netslim.train  # noqa: F401
except ModuleNotFoundError:  # a checkout that is not installed: links, as `make dev` makes them
    _links = tempfile.TemporaryDirectory()
    for room in ("train", "prune", "data", "launch"):
        link = Path(_links.name, "netslim", room)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(Path(__file__).resolve().parents[2] / room)
    sys.path.insert(0, _links.name)

from netslim.data import DataConfig, DataInfo, Loaders, Shard, open_calibration, open_loaders, prepare
from netslim.launch.run.inflight import InFlight
from netslim.prune import Calibration, Chunk, Rules, chunk_size, cost, map_channels, open_gammas, repair, slim
from netslim.train import (
    EngineConfig,
    FitConfig,
    ModelConfig,
    Record,
    Runtime,
    SparsityConfig,
    build_model,
    evaluate,
    fit,
    travel,
)

ABOUT = """Everything through netslim's own loop, loader, cut and repair, in one process, channels_last, SGD with the
penalty on all gammas. fp32 computes convolutions and products in TF32. Share of peak: 3 x 2 x multiply-accumulates of
the network per image, over the GPU's peak in dense bf16, in both precisions. Images are 32x32; those that are learnt
from are synthetic: a pattern for each of ten classes under noise. Clocks are read when the GPU has done its work;
warm-up and compilation do not count, where nothing else is said."""

# Dense bf16 TFLOP/s: the data sheets' figures "with sparsity" (H200 and H100 SXM 1,979, H100 PCIe 1,513), halved.
PEAK_SOURCE = "NVIDIA's data sheets, dense"
PEAKS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}
CLASSES, SIZE = 10, 32
RATIO, MIN_SHARE = 0.7, 0.05  # the paper's ratio for VGG-19, and a floor for each layer
PULL = 3.0
"""How far the penalty could move a gamma in a training, in initial gammas: so far that many come to zero."""
SPARSE_EPOCHS, FINETUNE_EPOCHS = 160, 40
RESERVE = 0.04
"""Share of the minutes for the end."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    networks: dict[str, tuple[str, float]]  # name and width; the key is what it is called
    batches: tuple[int, ...]
    compiled_batch: int
    warm_up: int  # steps
    block: int  # steps between two looks at the clock
    seconds: float  # for each figure, at least
    num_train: int
    num_test: int
    batch: int  # of trainings
    widths: tuple[float, ...]  # of the VGG-19 that is slimmed in flight
    epochs: int
    end_epochs: tuple[int, int]
    latency_batches: tuple[int, ...]
    workers: tuple[int, ...]
    compile_seconds: float  # what the first compilation of a network is taken to need


FULL = Sizes(
    networks={name: (name, 1.0) for name in ("vgg19", "densenet40", "preresnet164")},
    batches=(1024, 256, 4096),
    compiled_batch=1024,
    warm_up=5,
    block=5,
    seconds=1.0,
    num_train=50_000,
    num_test=10_000,
    batch=1024,
    widths=(1.0, 0.25),
    epochs=8,
    end_epochs=(8, 6),
    latency_batches=(256, 1),
    workers=(0, 8),
    compile_seconds=60.0,
)
TINY = Sizes(
    networks={"vgg19": ("vgg19", 1 / 16), "densenet40": ("densenet40", 1 / 6), "preresnet164": ("preresnet20", 0.25)},
    batches=(16, 8),
    compiled_batch=8,
    warm_up=1,
    block=1,
    seconds=0.01,
    num_train=320,
    num_test=64,
    batch=32,
    widths=(1 / 16,),
    epochs=3,
    end_epochs=(2, 2),
    latency_batches=(4, 1),
    workers=(0, 1),
    compile_seconds=5.0,
)


class OutOfTime(BaseException):  # no Exception: compilers catch those
    """The section's time is over."""


class Fitted(NamedTuple):
    """A training: the seconds of all its epochs, the mean of those after the first, the tests with them."""

    seconds: float
    per_epoch: float
    accuracy: float


class Cut(NamedTuple):
    """A network whose latency is measured."""

    name: str
    ratio: float
    round_to: int
    network: nn.Module


@dataclass
class Bench:
    """The device, the sizes, the clock, and the figures so far."""

    device: torch.device
    sizes: Sizes
    full: bool
    scratch: Path
    file: Path | None
    end: float  # on the monotonic clock
    figures: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    headlines: dict[str, float] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    section: str = ""
    section_end: float = 0.0
    data: tuple[DataConfig, DataInfo, Loaders] | None = None
    is_finished: threading.Lock = field(default_factory=threading.Lock)

    @property
    def peak(self) -> float | None:
        """FLOP/s in dense bf16, where it is known."""
        found = PEAKS.get(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        return None if found is None else found * 1e12

    def figure(self, **values: Cell) -> None:
        self.figures[self.section].append(values)
        short = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}
        print(json.dumps({"section": self.section, **short}), flush=True)

    def note(self, text: str) -> None:
        self.notes.setdefault(self.section, []).append(text)
        print(json.dumps({"section": self.section, "note": text}), flush=True)

    def has(self, seconds: float, what: str) -> bool:
        """Whether the section has so much time left; else it is said that ``what`` is not measured."""
        if self.section_end - time.monotonic() >= seconds:
            return True
        self.skipped[self.section] += 1
        print(json.dumps({"section": self.section, "no time left for": what}), flush=True)
        return False

    def run(self, section: "Callable[[Bench], None]", share: float) -> None:
        """Run a section in its share of the time that is left; what goes wrong in it is a note."""
        self.section = section.__name__
        self.figures[self.section] = []
        begun = time.monotonic()
        self.section_end = begun + share * (self.end - begun)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, self.section_end - begun))
            try:
                section(self)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            self.note("the time of this section is over")
        except Exception as error:
            self.note(f"failed: {said(error)}")
        print(json.dumps({"section": self.section, "seconds": round(time.monotonic() - begun, 1)}), flush=True)
        clear(self.device)

    def finish(self) -> bool:
        """Make tables of all figures; False where another thread is at it."""
        if not self.is_finished.acquire(blocking=False):
            return False
        peak = "unknown" if self.peak is None else f"{self.peak / 1e12:g} TFLOP/s ({PEAK_SOURCE})"
        results = Results("One GPU", f"{' '.join(ABOUT.split())} Peak of this device: {peak}.")
        for name, value in self.headlines.items():
            results.headline(name, value)
        for section, rows in self.figures.items():
            columns = list(dict.fromkeys(name for row in rows for name in row)) or [section]
            notes = [section.replace("_", " "), *self.notes.get(section, [])]
            if self.skipped[section]:
                notes.append(f"no time was left for {self.skipped[section]} more")
            results.table(columns, [[row.get(name) for name in columns] for row in rows], "; ".join(notes))
        results.finish(self.file)
        return True


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def clear(device: torch.device) -> None:
    """Give back what the last network has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def new_run(precision: str, compiled: bool = False) -> Runtime:
    """The engine of one training: Accelerate keeps one state for each process, which has to be forgotten before."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    return Runtime(EngineConfig(precision=precision, compile=compiled), seed=0)  # type: ignore[arg-type]


def network(name: str, width: float) -> nn.Module:
    return build_model(ModelConfig(name=name, width=width), CLASSES, seed=0)


def gammas_of(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


class Silent(Record):
    """Prints and writes nothing; keeps each epoch's metrics, with the time when they came."""

    def __init__(self, show: Callable[[dict[str, Any]], None] = lambda metrics: None) -> None:
        super().__init__("benchmark", Path(), is_main=False)
        self.epochs: list[dict[str, Any]] = []
        self.show = show

    def epoch(self, metrics: dict[str, Any], model: nn.Module, of: int | None = None) -> None:
        self.epochs.append({**metrics, "at": time.perf_counter()})
        self.show(metrics)


# Images


def images(bench: Bench) -> None:
    """Image files that can be learnt, written, prepared and put on the device, as a user's would be."""
    started = time.perf_counter()
    root = bench.scratch / "images"
    draws = np.random.default_rng(0)
    patterns = draws.normal(0, 30, (CLASSES, 8, 8, 3)).repeat(SIZE // 8, 1).repeat(SIZE // 8, 2).astype(np.float32)
    for split, num in (("train", bench.sizes.num_train), ("test", bench.sizes.num_test)):
        for label in range(CLASSES):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            noise = draws.standard_normal((num // CLASSES, SIZE, SIZE, 3), dtype=np.float32)
            pixels = (128 + patterns[label] + 60 * noise).clip(0, 255).astype(np.uint8)
            for number, image in enumerate(pixels):
                (folder / f"{number}.ppm").write_bytes(b"P6 %d %d 255\n" % (SIZE, SIZE) + image.tobytes())
    written = time.perf_counter()
    config = DataConfig(
        source="folder",
        root=root,
        cache=bench.scratch / "cache",
        batch_size=bench.sizes.batch,
        eval_batch_size=1024,
        loader="device",
    )
    info = prepare(config, quiet=True)
    prepared = time.perf_counter()
    opened = open_loaders(config, info, Shard(0, 1), seed=0, device=bench.device)
    bench.data = config, info, opened
    bench.figure(
        files=info.num_train + info.num_test,
        seconds_to_write=written - started,
        seconds_to_prepare=prepared - written,
        seconds_to_open_on_the_device=now(bench.device) - prepared,
    )


def opened_images(bench: Bench) -> tuple[DataConfig, DataInfo, Loaders]:
    if bench.data is None:
        raise RuntimeError("there are no images, since their section came to nothing")
    return bench.data


# Training steps


class Repeated:
    """One batch on the device, again and again until the clock has been read often enough."""

    def __init__(self, batch: tuple[Tensor, Tensor], sizes: Sizes) -> None:
        self.batch, self.sizes = batch, sizes
        self.seconds: list[float] = []
        """Per step, of each block."""

    def __len__(self) -> int:
        return 1000

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.batch[0].device
        for _ in range(self.sizes.warm_up):
            yield self.batch
        while len(self.seconds) < 3 or sum(self.seconds) * self.sizes.block < self.sizes.seconds:
            started = now(device)
            for _ in range(self.sizes.block):
                yield self.batch
            self.seconds.append((now(device) - started) / self.sizes.block)


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    precision: str
    compiled: bool = False
    search: bool = False

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "eager, cudnn.benchmark" if self.search else "eager"

    def __str__(self) -> str:
        return f"{self.name}, {self.mode}, {self.precision}, batch {self.batch}"


def cases(sizes: Sizes) -> Iterator[Case]:
    """The most telling first: compilation takes the time of many eager cases."""
    first = sizes.compiled_batch
    for precision in ("bf16", "fp32"):
        for batch in sizes.batches:
            yield from (Case(name, batch, precision) for name in sizes.networks)
    yield from (Case(name, first, "bf16", search=True) for name in sizes.networks)
    for name in sizes.networks:
        yield from (Case(name, first, precision, compiled=True) for precision in ("bf16", "fp32"))
    for batch in sizes.batches:
        if batch != first:
            yield from (Case(name, batch, "bf16", compiled=True) for name in sizes.networks)


def training_steps(bench: Bench) -> None:
    """Forward, backward, penalty and step, by `fit`, on one batch that is on the device."""
    needs: dict[tuple[str, bool], float] = {}
    for case in cases(bench.sizes):
        guess = bench.sizes.compile_seconds if case.compiled else 0.0
        if not bench.has(needs.get((case.name, case.compiled), guess), str(case)):
            continue
        started = time.monotonic()
        try:
            step(bench, case)
        except Exception as error:  # no memory, or no compiler: the other cases may have what they need
            bench.note(f"{case} failed: {said(error)}")
        clear(bench.device)
        needs[case.name, case.compiled] = time.monotonic() - started


def step(bench: Bench, case: Case) -> None:
    model = network(*bench.sizes.networks[case.name])
    macs = cost(model, torch.zeros(1, 3, SIZE, SIZE)).macs
    pixels = torch.randn(case.batch, 3, SIZE, SIZE, device=bench.device)
    labels = torch.randint(0, CLASSES, (case.batch,), device=bench.device)
    batch = pixels.contiguous(memory_format=torch.channels_last), labels
    batches = Repeated(batch, bench.sizes)
    run = new_run("no" if case.precision == "fp32" else case.precision, case.compiled)
    was = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = was or case.search
    started = time.perf_counter()
    try:
        fit(
            model,
            batches,
            [(batch[0][:2], labels[:2])],
            FitConfig(epochs=1, lr=1e-3, schedule="constant"),
            run=run,
            record=Silent(),
            gammas=gammas_of(model),
            sparsity=SparsityConfig(),
        )
    finally:
        torch.backends.cudnn.benchmark = was
        run.release()
    spent = time.perf_counter() - started
    images_per_second = case.batch / statistics.median(batches.seconds)
    bench.figure(
        network=case.name,
        mode=case.mode,
        precision=case.precision,
        batch=case.batch,
        images_per_second=images_per_second,
        slowest=case.batch / max(batches.seconds),
        fastest=case.batch / min(batches.seconds),
        share_of_peak=None if bench.peak is None else 6 * macs * images_per_second / bench.peak,
        gpu_gb=memory_gb(bench.device),
        seconds_in_all=spent,
    )


# Loaders


def loaders(bench: Bench) -> None:
    """Batches on the device, normalised: the device-resident loader against torch's DataLoader, nothing trained."""
    config, info, opened = opened_images(bench)
    resident = read(bench, "device", 0, opened)
    if bench.device.type == "cuda":
        check_waits(bench, opened)
    for workers in bench.sizes.workers:
        if bench.has(2 * bench.sizes.seconds, f"torch, {workers} workers"):
            other = replace(config, loader="torch", num_workers=workers)
            other_info = replace(info, loader="torch")
            opened = open_loaders(other, other_info, Shard(0, 1), seed=0, device=bench.device)
            found = read(bench, "torch", workers, opened)
            bench.headlines[f"images/s, resident on the device / torch's DataLoader, {workers} workers"] = (
                resident / found
            )


def read(bench: Bench, loader: str, workers: int, opened: Loaders) -> float:
    """Images per second, over epochs one after the other; the first batches, with which workers start, do not count."""
    begun = time.perf_counter()
    batches = (batch for epoch in itertools.count() for batch in opened.train.epoch(epoch))
    for _ in range(2 + workers):
        next(batches)
    started, num = now(bench.device), 0
    for _, labels in batches:
        num += len(labels)
        if time.perf_counter() - started > 2 * bench.sizes.seconds:
            break
    images_per_second = num / (now(bench.device) - started)
    bench.figure(
        loader=loader,
        workers=workers,
        batch=bench.sizes.batch,
        images_per_second=images_per_second,
        seconds_to_start=started - begun,
    )
    return images_per_second


def check_waits(bench: Bench, opened: Loaders) -> None:
    """Read an epoch in the mode in which torch refuses whatever makes the CPU wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in opened.train.epoch(0):
            pass
        bench.note("device: an epoch is read without one wait for the GPU")
    except RuntimeError as error:
        bench.note(f"device: something waits for the GPU: {said(error)}")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Slimming in flight


def in_flight(bench: Bench) -> None:
    """Sparsity training of VGG-19, whose channels at zero are removed while it goes on, or are not."""
    seconds = 0.0
    for width in bench.sizes.widths:
        for every, round_to in ((None, 1), (2, 1), (2, 16)):
            what = "all channels stay" if every is None else f"every {every} epochs, widths in multiples of {round_to}"
            if bench.has(seconds, f"width {width}, {what}"):
                started = time.monotonic()
                train_in_flight(bench, width, every, round_to, what)
                seconds = time.monotonic() - started
                clear(bench.device)


def train_in_flight(bench: Bench, width: float, every: int | None, round_to: int, what: str) -> None:
    _, _, data = opened_images(bench)
    run = new_run("bf16")
    model = network("vgg19", width).to(run.device)
    example = next(iter(data.test))[0][:2].contiguous()
    rules = Rules(min_share=MIN_SHARE, round_to=round_to)
    channels = map_channels(model, example)
    config = FitConfig(epochs=bench.sizes.epochs, lr=0.1, schedule="onecycle")
    weight = PULL * ModelConfig().first_gamma / travel(config, data.train.steps_per_epoch)  # type: ignore[operator]
    sparsity = SparsityConfig(weight=weight, method="proximal", reconfigure_every=every)
    dense = cost(model, example[:1]).macs
    record = Silent(
        lambda metrics: bench.figure(
            width=width,
            slimming=what,
            epoch=metrics["epoch"],
            images_per_second=metrics["images_per_second"],
            macs=metrics.get("macs", dense),
            channels_gone=metrics.get("channels_gone", 0),
            accuracy=metrics["accuracy"],
        )
    )
    started = now(bench.device)
    try:
        fit(
            model,
            data.train,
            data.test,
            config,
            run=run,
            record=record,
            gammas=open_gammas(model, channels, rules),
            sparsity=sparsity,
            slimming=None
            if every is None
            else InFlight(model, model, None, channels, rules, sparsity, run, example, most=RATIO),
        )
    finally:
        run.release()
    bench.note(f"width {width:g}, {what}: {now(bench.device) - started:.1f} s in all, cuts and tests with them")


# Latency


def cuts(bench: Bench) -> Iterator[Cut]:
    """VGG-19 with gammas drawn evenly from 0 to 1, whole and cut."""
    dense = network(*bench.sizes.networks["vgg19"]).eval()
    draws = torch.Generator().manual_seed(0)
    for gamma in gammas_of(dense):
        nn.init.uniform_(gamma, generator=draws)
    example = torch.randn(2, 3, SIZE, SIZE, generator=draws)
    yield Cut("dense", 0.0, 1, dense)
    for ratio in (RATIO, 0.5):
        for round_to in (1, 16):
            small, _ = slim(dense, example, ratio=ratio, round_to=round_to, min_share=MIN_SHARE)
            yield Cut(f"ratio {ratio}", ratio, round_to, small)


def latency(bench: Bench) -> None:
    """Inference of a dense and of slim VGG-19s, one batch after the other; a speed-up is over the dense one alike."""
    networks = list(cuts(bench))
    dense: dict[tuple[str, str, int], float] = {}
    needs = {"eager": 0.0, "compiled": bench.sizes.compile_seconds / 3}
    for mode in ("eager", "compiled"):
        for dtype in (torch.bfloat16, torch.float32) if mode == "eager" else (torch.bfloat16,):
            for batch in bench.sizes.latency_batches:
                for each in networks:
                    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
                    what = f"{each.name}, round_to {each.round_to}, {mode}, {precision}, batch {batch}"
                    if not bench.has(needs[mode], what):
                        continue
                    started = time.monotonic()
                    try:
                        found = milliseconds(bench, each.network, mode, dtype, batch)
                    except Exception as error:  # no compiler, say
                        bench.note(f"{what} failed: {said(error)}")
                        continue
                    needs[mode] = time.monotonic() - started
                    if each.ratio == 0:
                        dense[mode, precision, batch] = found
                    whole = dense.get((mode, precision, batch))
                    bench.figure(
                        network=each.name,
                        round_to=each.round_to,
                        mode=mode,
                        precision=precision,
                        batch=batch,
                        milliseconds=found,
                        speed_up=None if whole is None else whole / found,
                        macs=cost(each.network, torch.zeros(1, 3, SIZE, SIZE)).macs,
                    )


def milliseconds(bench: Bench, model: nn.Module, mode: str, dtype: torch.dtype, batch: int) -> float:
    """The median of calls, each from one GPU event to another, or by the CPU's clock."""
    device = bench.device
    twin = copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    pixels = torch.randn(batch, 3, SIZE, SIZE).to(device, dtype, memory_format=torch.channels_last)
    call: Callable[[Tensor], Any] = twin
    if mode == "compiled":
        torch.compiler.reset()
        call = torch.compile(twin, dynamic=False)
    times: list[float] = []
    with torch.no_grad():
        for _ in range(bench.sizes.warm_up):
            call(pixels)
        end = now(device) + bench.sizes.seconds / 2
        while len(times) < 5 or time.perf_counter() < end:
            times.append(timed(lambda: call(pixels), device))
    return statistics.median(times)


def timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


# From images to a fine-tuned slim network


def to_slim(bench: Bench) -> None:
    """Sparsity training, pruning to 30 % of the channels, repair, fine-tuning: timed, and extrapolated if short."""
    config, info, data = opened_images(bench)
    epochs = (SPARSE_EPOCHS, FINETUNE_EPOCHS) if bench.full else bench.sizes.end_epochs
    run = new_run("bf16")
    model = network(*bench.sizes.networks["vgg19"]).to(run.device)
    sparse = timed_fit(bench, "sparsity training", run, model, epochs[0], SparsityConfig())
    example = next(iter(data.test))[0][:2].contiguous()
    started = now(bench.device)
    small, plan = slim(model, example, ratio=RATIO, round_to=16, min_share=MIN_SHARE)
    cut_seconds = now(bench.device) - started
    cut_accuracy = evaluate(small, data.test, run).accuracy
    started = now(bench.device)
    num_images = min(2048, info.num_train)
    chunks = open_calibration(
        config, info, Shard(0, 1), num_images=num_images, chunk_size=chunk_size(num_images), seed=0, device=run.device
    )
    calibration = Calibration(
        read=lambda: (Chunk(*chunk) for chunk in chunks), num_images=num_images, example=chunks.first(2)
    )
    small, _ = repair(model, small, plan, calibration)
    repair_seconds = now(bench.device) - started
    repaired_accuracy = evaluate(small, data.test, run).accuracy
    tuned = timed_fit(bench, "fine-tuning", run, small, epochs[1], None)
    total = sparse.seconds + cut_seconds + repair_seconds + tuned.seconds
    # measured to the end under --full, where nothing is left to add
    total += (SPARSE_EPOCHS - epochs[0]) * sparse.per_epoch + (FINETUNE_EPOCHS - epochs[1]) * tuned.per_epoch
    how = "measured" if bench.full else f"extrapolated from {epochs[0]} + {epochs[1]} epochs"
    bench.headlines[f"minutes to a fine-tuned slim VGG-19, 160 + 40 epochs, {how}"] = total / 60
    bench.figure(
        how=how,
        minutes_of_160_and_40_epochs=total / 60,
        seconds_of_sparsity_training=sparse.seconds,
        seconds_per_later_epoch_of_it=sparse.per_epoch,
        seconds_of_cut=cut_seconds,
        seconds_of_repair=repair_seconds,
        seconds_of_finetuning=tuned.seconds,
        seconds_per_later_epoch_of_that=tuned.per_epoch,
        accuracy_sparse=sparse.accuracy,
        accuracy_cut=cut_accuracy,
        accuracy_repaired=repaired_accuracy,
        accuracy_finetuned=tuned.accuracy,
        macs_left=cost(small, example).macs / cost(model, example).macs,
        images=info.num_train,
    )


def timed_fit(
    bench: Bench, what: str, run: Runtime, model: nn.Module, epochs: int, sparsity: SparsityConfig | None
) -> Fitted:
    _, _, data = opened_images(bench)
    record = Silent(
        lambda metrics: print(
            json.dumps({"section": "to_slim", "stage": what} | {key: metrics[key] for key in ("epoch", "accuracy")}),
            flush=True,
        )
    )
    started = now(bench.device)
    fit(
        model,
        data.train,
        data.test,
        FitConfig(epochs=epochs, lr=0.1 if sparsity else 0.02, schedule="onecycle"),
        run=run,
        record=record,
        gammas=gammas_of(model) if sparsity else (),
        sparsity=sparsity,
    )
    seconds = now(bench.device) - started
    first, last = record.epochs[0], record.epochs[-1]
    return Fitted(seconds, (last["at"] - first["at"]) / (epochs - 1), last["accuracy"])


SECTIONS: dict[Callable[[Bench], None], float] = {
    images: 0.12,
    training_steps: 0.38,
    loaders: 0.07,
    in_flight: 0.15,
    latency: 0.12,
    to_slim: 0.16,
}
"""What of the time each may take; what one leaves goes to those after it."""


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it has ended")
    parser.add_argument("--full", action="store_true", help="only the way to a slim VGG-19, and all of it")
    parser.add_argument("--tiny", action="store_true", help="everything in miniature: to see whether it runs")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with --tiny")
    options = parser.parse_args()
    if not (options.tiny if options.cpu else torch.cuda.is_available()):
        print("bench_gpu needs a GPU; without one, --cpu --tiny runs every section in miniature", file=sys.stderr)
        return 2
    seconds = 60 * options.minutes * (1 - RESERVE) - age()
    if options.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            device=torch.device("cpu" if options.cpu else "cuda"),
            sizes=TINY if options.tiny else FULL,
            full=options.full,
            scratch=Path(scratch),
            file=options.json,
            end=time.monotonic() + seconds,
        )
        print(json.dumps(about(bench)), flush=True)
        timer = watch(bench, seconds)
        sections = {images: 0.12, to_slim: 0.88} if options.full else SECTIONS
        for number, (section, share) in enumerate(sections.items()):
            bench.run(section, share / sum(list(sections.values())[number:]))
        if not bench.finish():
            timer.join()  # which ends the process
        timer.cancel()
    return 0


def age() -> float:
    """Seconds since this process was started: its imports count, too."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def about(bench: Bench) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "peak_bf16_dense_tflops": None if bench.peak is None else bench.peak / 1e12,
        "peak_source": None if bench.peak is None else PEAK_SOURCE,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def watch(bench: Bench, seconds: float) -> threading.Timer:
    """End a section by an alarm when its time is over, and everything when nothing heeds it."""

    def ring(*_: object) -> None:
        raise OutOfTime

    def give_up() -> None:
        if bench.finish():
            os._exit(0)

    signal.signal(signal.SIGALRM, ring)
    timer = threading.Timer(seconds * (1 + RESERVE / 2), give_up)
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    sys.exit(main())
