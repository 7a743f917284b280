"""What the penalty on gammas costs a training step.

python tests/bench/bench_sparse_step.py [--networks vgg19 preresnet164 densenet40] [--batch 64] [--rounds 5]
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from results import Cell, Results, medians, new_parser, seconds, take_turns
from torch.nn import functional as F

from netslim.launch.run.processes import keep_freed_memory
from netslim.train import FitConfig, GammaPenalty, ModelConfig, build_model, make_optimizer

NETWORKS = ("vgg19", "preresnet164", "densenet40")
METHODS: tuple[Literal["subgradient", "proximal"], ...] = ("subgradient", "proximal")
STEPS, TURNS = 5, 20  # optimizer steps timed together; turns of a round
ABOUT = f"""An optimizer step with the penalty against one without, for networks of full width on 32x32 images. They
take turns, {STEPS} steps at a time; extra is the median difference from the plain steps of the same turn, ± its
standard error. Forward and backward pass are timed between the rounds, and the last column says what the extra is of
the whole training step."""
COLUMNS = (
    "network",
    "gammas",
    "method",
    "forward and backward, ms",
    "plain step, ms",
    "extra, ms",
    "±",
    "step / plain step",
    "extra, % of a training step",
)


def error_of_median(values: Sequence[float]) -> float:
    """Its standard error as of normal values, from the median distance, which outliers do not move."""
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * deviation / len(values) ** 0.5


def measure(name: str, batch: int, rounds: int) -> list[list[Cell]]:
    """A row for each method."""
    model = build_model(ModelConfig(name=name), num_classes=10, seed=0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    optimizer = make_optimizer(model, FitConfig(lr=1e-6))
    penalties = {method: GammaPenalty(model, weight=1e-4, method=method) for method in METHODS}

    def forward_backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    def plain() -> float:
        return seconds(optimizer.step, STEPS)

    def sparse(penalty: GammaPenalty) -> Callable[[], float]:
        def step() -> float:
            penalty.attach(optimizer)
            took = seconds(optimizer.step, STEPS)
            penalty.detach()
            return took

        return step

    contestants = {"plain": plain, **{method: sparse(penalty) for method, penalty in penalties.items()}}
    found: dict[str, list[float]] = {who: [] for who in (*contestants, "whole")}
    forward_backward()
    for _ in range(rounds):
        found["whole"].append(seconds(forward_backward))
        for who, took in take_turns(contestants, TURNS, warm_up=1).items():
            found[who] += took
    middle = medians(found)
    rows: list[list[Cell]] = []
    for method in METHODS:
        extra = [b - a for a, b in zip(found["plain"], found[method], strict=True)]
        more = statistics.median(extra)
        rows.append(
            [
                name,
                sum(gamma.numel() for gamma in penalties[method].gammas),
                method,
                1e3 * middle["whole"],
                1e3 * middle["plain"],
                1e3 * more,
                1e3 * error_of_median(extra),
                1 + more / middle["plain"],
                100 * more / (middle["whole"] + middle["plain"]),
            ]
        )
    return rows


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    results = Results("Sparse step", ABOUT)
    rows = [row for name in options.networks for row in measure(name, options.batch, options.rounds)]
    results.table(
        COLUMNS,
        rows,
        f"Batches of {options.batch}, float32, {torch.get_num_threads()} threads; medians of {options.rounds * TURNS} "
        f"turns, forward and backward of {options.rounds}.",
    )
    for method in METHODS:
        shares = [float(row[-1] or 0) for row in rows if row[2] == method]
        results.headline(f"{method}, % of a training step, most of the networks", max(shares))
    results.finish(options.json)


if __name__ == "__main__":
    main()
