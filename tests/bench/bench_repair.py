"""What a repair costs: seconds of each step as a share of a training epoch, and peak memory by number of images.

    python tests/bench/bench_repair.py [--width 0.25] [--ratio 0.5] [--images 2048 4096 8192] [--repeats 3]

VGG-19 for 32x32 images with random weights, cut at the ratio by random scales; random images, which are made chunk by
chunk, so that the memory is the repair's own. Each count of images runs in a process of its own. An epoch is 50,000
images in batches of 128, of which 20 batches are timed between the repairs.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import multiprocessing, nn
from torch.nn import functional as F

from netslim.prune import Calibration, Chunk, Rules, cut, map_channels, plan_network, score_channels
from netslim.prune.absorb import absorb
from netslim.prune.recalibrate import recalibrate
from netslim.prune.reconstruct import reconstruct
from netslim.train import ModelConfig, build_model

CHUNK, BATCH, EPOCH, TIMED = 64, 128, 50_000, 20


def calibration(num_images: int, device: torch.device) -> Calibration:
    def read() -> Iterator[Chunk]:
        for number in range(num_images // CHUNK):
            generator = torch.Generator().manual_seed(number)
            images = torch.randn(CHUNK, 3, 32, 32, generator=generator).to(device)
            yield Chunk(number, images, torch.randint(0, 10, (CHUNK,), generator=generator).to(device))

    return Calibration(read=read, num_images=num_images, example=torch.zeros(2, 3, 32, 32, device=device))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def epoch_seconds(model: nn.Module, device: torch.device) -> float:
    """Extrapolated from some steps of plain SGD."""
    model = model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), device=device)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    steps(3)
    return seconds(lambda: steps(TIMED), device) * EPOCH / (BATCH * TIMED)


def measure(num_images: int, width: float, ratio: float, device_name: str) -> dict[str, float]:
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
        "absorb": seconds(lambda: absorb(model, small, plan, images.example), device),
        "reconstruct": seconds(lambda: reconstruct(model, small, plan, images), device),
        "recalibrate": seconds(lambda: recalibrate(small, images), device),
    }
    found["repair_mb"] = peak_mb(device) - before
    rules = Rules(score="reconstruction")
    found["score"] = seconds(lambda: score_channels(model, channels, rules, images), device)
    found["epoch"] = epoch_seconds(model, device)
    return found


def peak_mb(device: torch.device) -> float:
    """The most that was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--images", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    names = ("absorb", "reconstruct", "recalibrate", "score", "epoch")
    print(
        f"{'images':>7}" + "".join(f"{name:>13} s" for name in names) + "  reconstruct / epoch   peak of the repair, MB"
    )
    rounds: dict[int, list[dict[str, float]]] = {count: [] for count in options.images}
    for _ in range(options.repeats):
        for count, found in rounds.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(measure, (count, options.width, options.ratio, options.device)))
    for count, found in rounds.items():
        middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
        share = statistics.median(each["reconstruct"] / each["epoch"] for each in found)
        line = "".join(f"{middle[name]:>15.1f}" for name in names)
        print(f"{count:>7}{line}  {share:>19.1%}  {middle['repair_mb']:>23.0f}")


if __name__ == "__main__":
    main()
