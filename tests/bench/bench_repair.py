"""What a repair costs: seconds of each step beside those of a training epoch, and memory, by number of images.

python tests/bench/bench_repair.py [--width 0.25] [--ratio 0.5] [--images 1024 2048 4096] [--repeats 3]
"""

import resource
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from results import Cell, Results, new_parser, seconds, take_turns
from torch import multiprocessing, nn
from torch.nn import functional as F

from netslim.launch.run.processes import keep_freed_memory
from netslim.prune import Calibration, Chunk, Rules, cut, map_channels, plan_network, score_channels
from netslim.prune.repair.absorption import absorb
from netslim.prune.repair.recalibration import recalibrate
from netslim.prune.repair.reconstruction import reconstruct
from netslim.train import ModelConfig, build_model

CHUNK, BATCH, EPOCH, TIMED = 64, 128, 50_000, 20
STEPS = ("absorb", "reconstruct", "recalibrate", "score", "epoch")
ABOUT = f"""The steps of a repair, and the score by reconstruction, against a training epoch of {EPOCH:,} images in
batches of {BATCH}, of which {TIMED} are timed. VGG-19 for 32x32 images with random weights, cut by random scales;
random images, made chunk by chunk, so that the memory is the repair's own. Each count of images runs in a process of
its own."""


def calibration(num_images: int, device: torch.device) -> Calibration:
    def read() -> Iterator[Chunk]:
        for number in range(num_images // CHUNK):
            generator = torch.Generator().manual_seed(number)
            images = torch.randn(CHUNK, 3, 32, 32, generator=generator).to(device)
            yield Chunk(number, images, torch.randint(0, 10, (CHUNK,), generator=generator).to(device))

    return Calibration(read=read, num_images=num_images, example=torch.zeros(2, 3, 32, 32, device=device))


def epoch_seconds(model: nn.Module, device: torch.device) -> float:
    """Extrapolated from some steps of plain SGD."""
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    seconds(step, 3)
    return seconds(step, TIMED) * EPOCH / BATCH


def measure(num_images: int, width: float, ratio: float, device_name: str) -> dict[str, float]:
    """Seconds of each of STEPS, and "peak", the repair's memory in MB."""
    keep_freed_memory()
    device = torch.device(device_name)
    model = build_model(ModelConfig(name="vgg19", width=width), 10, seed=0).to(device)
    generator = torch.Generator().manual_seed(0)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.weight.data = torch.rand(norm.num_features, generator=generator).to(device) + 0.01
    images = calibration(num_images, device)
    recalibrate(model.eval(), images)
    channels = map_channels(model, images.example[:1])
    plan = plan_network(model, channels, images.example[:1], ratio, Rules(min_share=0.1))
    small = cut(model, plan)
    before = peak_mb(device)
    found = {
        "absorb": seconds(lambda: absorb(model, small, plan, images.example)),
        "reconstruct": seconds(lambda: reconstruct(model, small, plan, images)),
        "recalibrate": seconds(lambda: recalibrate(small, images)),
    }
    found["peak"] = peak_mb(device) - before
    rules = Rules(score="reconstruction")
    found["score"] = seconds(lambda: score_channels(model, channels, rules, images))
    found["epoch"] = epoch_seconds(model, device)
    return found


def peak_mb(device: torch.device) -> float:
    """The most that was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def in_a_process(num_images: int, width: float, ratio: float, device_name: str) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (num_images, width, ratio, device_name))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--images", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    results = Results("Repair", ABOUT)
    contestants = {
        str(images): partial(in_a_process, images, options.width, options.ratio, options.device)
        for images in options.images
    }
    found = take_turns(contestants, options.repeats)
    rows: list[list[Cell]] = []
    for images, runs in found.items():
        share = statistics.median(run["reconstruct"] / run["epoch"] for run in runs)
        middle = [statistics.median(run[name] for run in runs) for name in (*STEPS, "peak")]
        rows.append([int(images), *middle[:-1], 100 * share, middle[-1]])
    results.table(
        ("images", *(f"{step}, s" for step in STEPS), "reconstruct, % of an epoch", "repair's peak, MB"),
        rows,
        f"Width {options.width}, ratio {options.ratio}, medians of {options.repeats} repetitions.",
    )
    results.headline(f"reconstruction by {rows[0][0]:,} images, % of an epoch", rows[0][-2])
    results.finish(options.json)


if __name__ == "__main__":
    main()
