"""What a sparse model can bear: its gammas, layer by layer, and what each ratio costs, cut and repaired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netslim.data import Shard, open_loaders
from netslim.launch.run import SPARSE, Job, write_json
from netslim.launch.tables import aligned
from netslim.prune import (
    Calibration,
    ChannelMap,
    RepairConfig,
    Rules,
    cost,
    cut,
    gammas,
    map_channels,
    open_gammas,
    plan_network,
    repair,
    score_channels,
    too_few,
)
from netslim.prune.tables import gammas_as_text, threshold_line
from netslim.train import describe_pull, evaluate, travel

INSPECTION, PICTURE = "inspect.json", "inspect.png"
"""In a run's directory, or where the flag says."""
OUT_VARIABLE = "NETSLIM_INSPECTION"
"""By which `netslim inspect` says to its processes where that is."""


def try_ratio(
    model: nn.Module,
    channels: ChannelMap,
    scores: Mapping[str, torch.Tensor],
    ratio: float,
    rules: Rules,
    config: RepairConfig,
    calibration: Calibration,
    accuracy: Callable[[nn.Module], float],
) -> dict[str, Any]:
    """Cut and repair a copy of the model; gives accuracies and costs, or why the ratio is refused."""
    example = calibration.example
    try:
        plan = plan_network(model, channels, example[:1], ratio, rules, scores)
        small = cut(model, plan)
        repaired, steps = small, []
        if too_few(calibration.num_images) is None:
            repaired, report = repair(model, small, plan, calibration, config)
            steps = list(report.kept)
    except ValueError as error:
        return {"ratio": ratio, "refused": str(error)}
    price = cost(small, example[:1])
    return {
        "ratio": ratio,
        "cut": accuracy(small),
        "repaired": accuracy(repaired),
        "steps": steps,
        "params": price.params,
        "macs": price.macs,
    }


def inspect_sparse(job: Job, out: Path) -> None:
    """Cut and repair the sparse model at many ratios, each in one of the processes; rank 0 writes what they found.

    The run's own directory is only read.
    """
    config, run = job.config, job.run
    sparse = job.read(SPARSE)
    channels = map_channels(sparse, job.blank_image, config.prune.coupling)

    def try_own() -> list[dict[str, Any]]:
        alone = Shard(0, 1)
        calibration = job.calibrate(alone)
        test = open_loaders(config.data, job.loaders.info, alone, seed=config.seed, device=run.device).test
        scores = score_channels(sparse, channels, config.prune.rules, calibration)
        own = config.inspect.ratios[run.rank :: run.world_size]
        return [
            try_ratio(
                sparse,
                channels,
                scores,
                ratio,
                config.prune.rules,
                config.repair,
                calibration,
                lambda network: evaluate(network, test, run, alone=True).accuracy,
            )
            for ratio in own
        ]

    own = run.on_all(try_own)
    accuracy = evaluate(sparse, job.loaders.test, run).accuracy
    everyone = run.gather(own)

    def write() -> None:
        ratio = max(config.prune.ratio)
        price = cost(sparse, job.blank_image)
        first = open_gammas(job.build(), channels, config.prune.rules)
        pull, _ = describe_pull(
            first, config.sparsity.weight, travel(config.sparsify, job.loaders.train.steps_per_epoch)
        )
        seen = gammas(sparse, channels, ratio=ratio, coupling=config.prune.coupling)
        found = {
            "accuracy": accuracy,
            "params": price.params,
            "macs": price.macs,
            "pull": pull,
            "ratio": ratio,
            "layers": list(seen),
            "threshold": seen.threshold,
            "ratios": sorted((row for rows in everyone or [] for row in rows), key=lambda row: float(row["ratio"])),
        }
        write_json(out / INSPECTION, found)

    run.on_main(write)


def largest_ratio(found: dict[str, Any], loss: float) -> float | None:
    """The largest ratio that, repaired, loses no more than ``loss`` of the sparse model's accuracy; None if none."""
    borne = [row["ratio"] for row in found["ratios"] if row.get("repaired", -1.0) >= found["accuracy"] - loss]
    return max(borne, default=None)


def format_inspection(found: dict[str, Any], loss: float) -> str:
    """What ``inspect`` found, as text: gammas by layer, the pull, accuracy by ratio."""
    threshold = threshold_line(found["layers"], found["ratio"], found["threshold"])
    lines = [gammas_as_text(found["layers"]), threshold, "", found["pull"], ""]
    emptied = [row["layer"] for row in found["layers"] if row["below_threshold"] == 1]
    if emptied:
        lines += [f"the threshold of ratio {found['ratio']:g} would empty {', '.join(emptied)}; floors hold them", ""]
    return "\n".join([*lines, _ratio_table(found, largest_ratio(found, loss), loss)])


def _ratio_table(found: dict[str, Any], best: float | None, loss: float) -> str:
    lines = [["ratio", "cut", "repaired", "params", "macs", ""]]
    lines.append(
        ["0", f"{found['accuracy']:.2%}", "", f"{found['params']:,}", f"{found['macs']:,}", "the sparse model"]
    )
    refused = []
    for row in found["ratios"]:
        if "refused" in row:
            refused.append(f"ratio {row['ratio']:g}: {row['refused']}")
            continue
        mark = f"<- the largest that loses at most {loss:.2%}" if row["ratio"] == best else ""
        figures = [f"{row['cut']:.2%}", f"{row['repaired']:.2%}", f"{row['params']:,}", f"{row['macs']:,}"]
        lines.append([f"{row['ratio']:g}", *figures, mark])
    none = [] if best is not None else [f"no ratio loses at most {loss:.2%}"]
    return "\n".join([aligned(lines), *refused, *none])
