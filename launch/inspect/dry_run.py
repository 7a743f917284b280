"""What a command would do, said instead of done: its configuration, its stages, what is cut, and what that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from netslim.data import Source, notes_here, open_source
from netslim.launch.config import RunConfig, run_directory, to_yaml
from netslim.launch.inspect.demand import disk_lines, memory_line, own_memory, training_demand
from netslim.launch.inspect.describe import build_first, map_first, predict_pull
from netslim.launch.run import (
    SPARSE,
    Kind,
    Stage,
    check_batch,
    check_network,
    check_same,
    count_processes,
    is_complete,
    rehearse_cuts,
    stages_of,
)
from netslim.launch.tables import aligned
from netslim.prune import ChannelMap, Plan, cautions, open_gammas
from netslim.train import num_gpus

_FROM = {Kind.FINETUNED: "", Kind.FINETUNED_CUT: ", from the cut network", Kind.SCRATCH: ", from new weights"}


def foresee(command: str, preset: str, config: RunConfig, commands: Sequence[str]) -> str:
    """Say what the command would do; the text is itself a file for `--config`. Nothing is started or written.

    Raises ValueError or OSError where the command would be refused before it trains.
    """
    num_processes = count_processes(config)
    config.record.check_installed()
    check_network(config)
    check_batch(config, num_processes)
    directory = run_directory(preset, config)
    check_same(directory, config)
    source, missing = _images(config)
    program = own_memory()
    is_trained = is_complete(SPARSE.directory(directory))
    model = build_first(config, is_trained=is_trained, num_classes=len(source.classes) if source else 10)
    channels = map_first(config, model)
    stages = stages_of(commands, config)
    todo = [stage for stage in stages if not is_complete(stage.directory(directory))]
    plans = dict(zip(config.prune.ratio, rehearse_cuts(model, channels, config), strict=True))
    on_gpu = bool(num_gpus()) and not config.cpu
    demand = training_demand(model, config, num_processes, on_gpu=on_gpu)
    steps = len(source.train) // config.data.batch_size if source else None
    said = [
        f"{command} {preset} --dry-run: nothing is started or written. This text is a file for --config.",
        None,
        f"stages, in {directory}, by {num_processes} {'GPU' if on_gpu else 'CPU'} process{'es' * (num_processes > 1)}:",
        *_table(stages, todo, config, plans, steps).splitlines(),
        None,
        *_cut(config, model, channels),
        *_pull(config, model, channels, source),
        *(f"warning: {note}" for note in (*(source.notes if source else ()), *notes_here(config.data))),
        *missing,
        None,
        memory_line(demand, config, num_processes, program, on_gpu=on_gpu),
        *disk_lines(model, config, todo, directory, source),
    ]
    head, *rest = [f"# {line}".rstrip() if line else "#" for line in said]
    return "\n".join([head, to_yaml(config).rstrip(), *rest])


def _images(config: RunConfig) -> tuple[Source | None, list[str]]:
    """The images, or a line that says why they are not at hand."""
    try:
        return open_source(replace(config.data, download=False)), []
    except (ValueError, OSError) as error:
        unknown = "the number of steps, the pull and the images' room on the disk are not known"
        if config.data.download:
            return None, [f"the images are downloaded first; until then {unknown}"]
        return None, [f"warning: the run would be refused, and {unknown}: {' '.join(str(error).split())}"]


def _table(
    stages: Sequence[Stage], todo: Sequence[Stage], config: RunConfig, plans: Mapping[float, Plan], steps: int | None
) -> str:
    """A row for each stage: its directory, what it does, and whether that is done already."""
    rows = [
        (each.directory_name, _about(each, config, plans, steps), "to do" if each in todo else "done")
        for each in stages
    ]
    return aligned(rows, rows[0])


def _about(stage: Stage, config: RunConfig, plans: Mapping[float, Plan], steps: int | None) -> str:
    of_steps = f" of {steps:,} steps" if steps is not None else ""
    match stage.kind:
        case Kind.SPARSE:
            return f"sparsity training, {config.sparsify.epochs} epochs{of_steps}"
        case Kind.CUT:
            plan = plans[stage.turn.ratio]
            if not stage.turn.is_last:
                return f"cut on the way to ratio {stage.turn.ratio:g}: {stage.ratio:.1%} of the {config.prune.target}"
            if config.prune.target == "channels":
                return f"cut {plan.num_removed:,} of {plan.num_channels:,} channels"
            return f"cut {stage.ratio:.1%} of the {config.prune.target}"
        case Kind.REPAIRED:
            return f"repair by {', '.join(config.repair.steps)}, no training step"
        case _:
            return f"fine-tuning, {config.finetune.epochs} epochs{of_steps}{_FROM[stage.kind]}"


def _cut(config: RunConfig, model: nn.Module, channels: ChannelMap) -> list[str]:
    """What can go of the network, and why the rest stays."""
    coupling, size = config.prune.coupling, config.data.size
    rules = f"; rules: {config.prune.rules}" if str(config.prune.rules) else ""
    cautious = (f"warning: {line}" for line in cautions(model, channels, coupling))
    return [f"{config.model.name} on images of {size}x{size}: {channels.summary(coupling)}{rules}", *cautious]


def _pull(config: RunConfig, model: nn.Module, channels: ChannelMap, source: Source | None) -> list[str]:
    if source is None:
        return []
    return [predict_pull(config, open_gammas(model, channels, config.prune.rules), len(source.train))]
