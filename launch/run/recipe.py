"""The whole recipe of network slimming: which stages a run has, in which order, and what makes each of them."""

from collections.abc import Collection
from dataclasses import replace

import torch

from netslim.launch.config import RunConfig
from netslim.launch.run.job import Job
from netslim.launch.run.runner import Make, run_stage
from netslim.launch.run.stage import COMMANDS, TRAINED, Command, Kind, Pass, Stage, passes_to
from netslim.launch.run.stages import finetune, prune, restore, sparsify
from netslim.prune import cut_proved, map_channels

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
    rules = replace(job.config.prune.rules, score="gamma")

    def plan_all() -> None:
        model = job.build()
        channels = map_channels(model, job.blank_image, job.config.prune.coupling)
        noise = torch.randn(job.blank_image.shape, generator=torch.Generator().manual_seed(0)).to(job.blank_image)
        for ratio in job.config.prune.ratio:
            cut_proved(model, channels, noise, ratio, rules)

    job.run.on_main(plan_all)
