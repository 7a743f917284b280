"""What the gamma penalty costs: an optimizer step with it against one without, and the whole training step.

Run: python tests/bench/bench_sparse_step.py
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from netslim.train import FitConfig, GammaPenalty, ModelConfig, build_model, make_optimizer

NETWORKS = {"vgg19": 0.25, "preresnet20": 1.0, "densenet40": 0.5}  # name: width
BATCH = 32
REPETITIONS = 15


def seconds(function: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - started) / times


def measure(name: str, width: float) -> dict[str, float]:
    """Median seconds of the plain and sparse optimizer step, and of forward and backward; interleaved."""
    model = build_model(ModelConfig(name=name, width=width), num_classes=10, seed=0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    optimizer = make_optimizer(model, FitConfig(lr=1e-6))
    penalty = GammaPenalty(model, weight=1e-4)

    def forward_backward() -> None:
        F.cross_entropy(model(images), labels).backward()

    def plain() -> None:
        samples["plain"].append(seconds(optimizer.step, 20))

    def sparse() -> None:
        penalty.attach(optimizer)
        samples["sparse"].append(seconds(optimizer.step, 20))
        penalty.detach()

    forward_backward()
    samples: dict[str, list[float]] = {"plain": [], "sparse": [], "forward_backward": []}
    for repetition in range(REPETITIONS):
        # what comes first finds colder caches, so they take turns
        for step in (plain, sparse) if repetition % 2 else (sparse, plain):
            step()
        samples["forward_backward"].append(seconds(forward_backward, 1))
    return {kind: statistics.median(values) for kind, values in samples.items()}


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"batch {BATCH}, 32x32, fp32; medians of {REPETITIONS} interleaved repetitions")
    for name, width in NETWORKS.items():
        times = measure(name, width)
        whole = (times["forward_backward"] + times["sparse"]) / (times["forward_backward"] + times["plain"])
        print(
            f"{name:<14} optimizer step {times['plain'] * 1e6:7.0f} us plain, {times['sparse'] * 1e6:7.0f} us sparse: "
            f"ratio {times['sparse'] / times['plain']:.3f}; whole training step: ratio {whole:.4f}"
        )


if __name__ == "__main__":
    main()
