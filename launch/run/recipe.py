"""The whole recipe of network slimming: which stages a run has, in which order, and what makes each of them."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from netslim.launch.config import RunConfig
from netslim.launch.run.job import Job
from netslim.launch.run.runner import Make, run_stage
from netslim.launch.run.stage import COMMANDS, TRAINED, Command, Kind, Pass, Stage, passes_to
from netslim.launch.run.stages import finetune, prune, restore, sparsify
from netslim.prune import ChannelMap, Plan, cut_proved, map_channels

MAKE: dict[Command, Make] = {"sparsify": sparsify, "prune": prune, "repair": restore, "finetune": finetune}
"""What is particular to the stages of each command; `run_stage` does what all stages have in common."""


def run_recipe(job: Job, commands: Collection[str] = COMMANDS) -> None:
    """Make the stages of these commands, those alone that are not done; every rank of a run calls this."""
    rehearse(job)
    for stage in stages_of(commands, job.config):
        run_stage(job, stage, MAKE[stage.kind.command])


def stages_of(commands: Collection[str], config: RunConfig) -> list[Stage]:
    """The stages of these commands, in the order in which a run makes them.

    Sparsify once; then for each ratio cut the same sparse model, repair and fine-tune what is left. In several passes
    what is left is sparsified and cut again before it is fine-tuned.
    """
    found = []
    for ratio in config.prune.ratio:
        for turn in passes_to(ratio, config.prune.passes):
            found += [Stage(Kind.SPARSE, turn), Stage(Kind.CUT, turn)]
            if config.repair.steps:
                found.append(Stage(Kind.REPAIRED, turn))
        found += [Stage(TRAINED[start], Pass(ratio)) for start in config.finetune.start]
    once = {stage.directory_name: stage for stage in reversed(found)}  # the first sparsity training is every ratio's
    return [stage for stage in found if stage is once[stage.directory_name] and stage.kind.command in commands]


def commands_of(command: str, config: RunConfig) -> tuple[str, ...]:
    """The commands whose stages a command is about; ValueError where the configuration does not go with it."""
    if command == "repair" and not config.repair.steps:
        raise ValueError(
            "repair.steps is empty, so there is nothing to repair by; name absorb, reconstruct or recalibrate"
        )
    if config.prune.passes > 1 and command != "run":
        raise ValueError(
            f"prune.passes is {config.prune.passes}, in which the stages take turns; use netslim run, or one pass"
        )
    return COMMANDS if command == "run" else (command,)


def rehearse(job: Job) -> None:
    """Cut the untrained network at every ratio: what the floors or the network's code do not allow fails beforehand."""

    def cut_all() -> None:
        model = job.build()
        rehearse_cuts(model, map_channels(model, job.blank_image, job.config.prune.coupling), job.config)

    job.run.on_main(cut_all)


def rehearse_cuts(model: nn.Module, channels: ChannelMap, config: RunConfig) -> list[Plan]:
    """The plans by which a network would be cut at each ratio, as it stands and by its gammas; raises as a cut does."""
    rules, size = replace(config.prune.rules, score="gamma"), config.data.size
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()).device)
    return [cut_proved(model, channels, noise, ratio, rules).plan for ratio in config.prune.ratio]
