"""The command ``netslim sweep``: a grid of lambdas, ratios and seeds, of which each sparse model is trained once."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from netslim.data import prepare
from netslim.launch.batch import SlurmConfig, describe_flags, queued, split_flags
from netslim.launch.config import RunConfig, differences, to_dict, unread_fields
from netslim.launch.mistakes import INTERRUPTED, PREEMPTED, warn
from netslim.launch.presets import PRESETS, find_preset, list_presets, read_preset
from netslim.launch.reading import read_flags, recorded_as, warn_of_unread
from netslim.launch.run import METRICS, PREEMPTED_MARK, check_batch, check_network, count_processes, launch, read_row
from netslim.launch.sweep.grid import INDEX, Member, Sweep
from netslim.launch.sweep.jobs import submit_members
from netslim.launch.tables import aligned, printable
from netslim.train import LostRankError

_MANY = 100
Compare = Callable[[Sequence[str]], int]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SweepConfig:
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Lambdas; None is the preset's. 0 trains the network without the penalty, to compare with."""
    ratios: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    """Ratios at which each sparse model is pruned; None is the preset's."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """None is the preset's."""
    slurm: bool = False
    """Submit the members as jobs of SLURM, instead of running them here one after the other."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Jobs that train sparse models at the same time, and as many that prune and fine-tune; None: as many as can be."""
    yes: bool = False
    """Make a grid of more than a hundred members."""
    status: bool = False
    """Print how far each member is, and start nothing."""


def sweep_runs(arguments: Sequence[str], description: str, compare: Compare) -> int:
    """Make a sweep, or go on with one: with its members that are neither done nor at work.

    ``compare`` is the command that a sweep ends with, once its members are done.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: netslim sweep PRESET|SWEEP [flags]\n\n{description}\n\n{list_presets()}\n")
        print(f"{describe_flags(SweepConfig)}\n\nWith --slurm also, and any option of sbatch:\n")
        print(describe_flags(SlurmConfig))
        return 0
    target, *flags = arguments if arguments[0] != "--status" else [*arguments[1:], "--status"]
    (of_sweep, of_slurm), options, rest = split_flags(flags, [SweepConfig, SlurmConfig])
    config = read_flags(SweepConfig, of_sweep, prog=f"netslim sweep {target}")
    jobs = [*of_slurm, *options]
    sweep = new_sweep(target, config, rest) if target in PRESETS else known_sweep(Path(target), config, rest)
    if config.status:
        print(format_status(sweep))
        return 0
    if not config.slurm and (of_jobs := [*jobs, *(["--limit"] if config.limit is not None else [])]):
        raise ValueError(f"{of_jobs[0]} is for jobs of SLURM; give --slurm too, or leave it out")
    sweep.base.record.check_installed()
    check_network(sweep.base)
    if os.environ.pop("WANDB_RUN_ID", None) is not None:
        warn("ignores WANDB_RUN_ID: it names one run, and a sweep has many")
    return submit_members(sweep, jobs, config.limit) if config.slurm else run_members(sweep, compare)


def new_sweep(preset: str, config: SweepConfig, flags: Sequence[str]) -> Sweep:
    """The sweep of a preset's command; where its directory holds one, the members of both."""
    for flag in flags:
        taken = {"--sparsity.weight": "--weights", "--prune.ratio": "--ratios", "--seed": "--seeds"}
        if flag.partition("=")[0] in taken:
            raise ValueError(f"{flag} is what a sweep varies; give {taken[flag.partition('=')[0]]} instead")
    base = read_preset("netslim sweep", preset, flags, is_run=False)
    directory = (base.run_dir or Path("runs") / f"{preset}-sweep").absolute()
    before = Sweep.read(directory) if (directory / INDEX).is_file() else None
    if config.status:
        if before is None:
            raise ValueError(f"{directory} is no sweep: it holds no {INDEX}; name a sweep's directory")
        return before
    if before is not None:
        base = recorded_as(before.base.record, base, directory, flags)
    warn_of_unread(find_preset(preset)(), base, unread_fields(base))
    members = grid(config, base)
    if len(members) > _MANY and not config.yes:
        raise ValueError(f"the grid has {len(members):,} members; give --yes if that is meant")
    sweep = Sweep(directory, preset, base, members, [], {})
    if before is not None:
        differing = differences(to_dict(before.base), to_dict(base))
        if differing:
            raise ValueError(
                f"{directory} holds a sweep of another configuration: {'; '.join(differing)}. "
                "Use the same values, or another --run-dir"
            )
        every = [*before.members, *(member for member in members if member not in before.members)]
        sweep.members, sweep.slurm, sweep.jobs = every, before.slurm, before.jobs
    return sweep


def known_sweep(directory: Path, config: SweepConfig, flags: Sequence[str]) -> Sweep:
    """The sweep in a directory, as its index has it."""
    if not (directory / INDEX).is_file():
        if not directory.is_dir():
            find_preset(str(directory))  # raises, and names the presets nearest to it
        raise ValueError(f"{directory} is no sweep: it holds no {INDEX}; name a preset, or a sweep's directory")
    grown = [f"--{name}" for name in ("weights", "ratios", "seeds") if getattr(config, name) is not None]
    if flags or grown:
        raise ValueError(f"{[*grown, *flags][0]} would change the sweep in {directory}; give its whole command instead")
    return Sweep.read(directory)


def grid(config: SweepConfig, base: RunConfig) -> list[Member]:
    """All members, each sparse model before what is made of it; ValueError where there are none, or one twice."""
    axes = {
        "weights": config.weights if config.weights is not None else (base.sparsity.weight,),
        "ratios": config.ratios if config.ratios is not None else base.prune.ratio,
        "seeds": config.seeds if config.seeds is not None else (base.seed,),
    }
    for name, values in axes.items():
        if not values:
            raise ValueError(f"--{name} has no values, so the grid has no members; give one or more")
        twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if twice:
            raise ValueError(f"--{name} names {twice[0]:g} twice; name each once")
    models = [Member(float(weight), int(seed)) for seed in axes["seeds"] for weight in axes["weights"]]
    return [
        member
        for model in models
        for member in (model, *(Member(model.weight, model.seed, float(ratio)) for ratio in axes["ratios"]))
    ]


def run_members(sweep: Sweep, compare: Compare) -> int:
    """Run what is not done here, one member after the other; a member that fails does not keep the others from it."""
    num_processes = count_processes(sweep.base)
    check_batch(sweep.base, num_processes)
    todo = [member for member in sweep.members if not sweep.is_done(member)]
    sweep.make(todo)
    sweep.write()
    try:
        if todo:
            prepare(sweep.base.data, quiet=False)
    except (ValueError, OSError) as error:  # none of them can be run
        for member in todo:
            sweep.mark_failed(member, " ".join(str(error).split()))
        raise
    for seed in dict.fromkeys(member.seed for member in todo):
        left = [member for member in todo if member.seed == seed]
        while left:
            code = _run_processes(sweep, left, num_processes)
            if code in (PREEMPTED, INTERRUPTED) or code > 128:
                return code
            left = _after_failure(sweep, left, code) if code else []
    print(format_status(sweep))
    compare([str(sweep.directory)])
    failed = [member.name for member in sweep.members if not sweep.is_done(member)]
    if failed:
        print(f"netslim: not done: {', '.join(failed)}; to try again: netslim sweep {sweep.directory}", file=sys.stderr)
    return int(bool(failed))


def _run_processes(sweep: Sweep, members: Sequence[Member], num_processes: int) -> int:
    def at_work() -> str:
        return next((member.name for member in members if not sweep.is_done(member)), "the end")

    try:
        return launch(
            "netslim.launch.sweep",
            [str(sweep.directory), *(member.name for member in members)],
            num_processes=num_processes,
            zero=sweep.base.engine.zero,
            precision=sweep.base.engine.precision,
            max_restarts=sweep.base.max_restarts,
            stage=at_work,
            was_preempted=lambda: any((sweep.path(member) / PREEMPTED_MARK).is_file() for member in members),
        )
    except LostRankError as error:
        print(f"netslim: {error}", file=sys.stderr)
        sweep.note_failure(members, str(error))
        return 1


def _after_failure(sweep: Sweep, members: Sequence[Member], code: int) -> list[Member]:
    """The members that can still be run after one has failed: not those of its sparse model."""
    failed = sweep.note_failure(members, f"its processes ended with exit code {code}")
    if failed is None:
        return []
    rest = members[members.index(failed) + 1 :]
    return [member for member in rest if member.sparse != failed]


def format_status(sweep: Sweep) -> str:
    """A line for each member: how far it is, and its last accuracy."""
    queue = {}
    if sweep.jobs:
        try:
            queue = queued()
        except ValueError as error:  # on another machine, or while SLURM is down: the directories say the rest
            warn(f"which jobs wait or run is not known: {error}")
    lines = [("member", "state", "accuracy", "job")]
    for member in sweep.members:
        state = printable(sweep.state(member, queue))
        accuracy = _accuracy(sweep, member) if state == "done" else "-"
        lines.append((member.name, state, accuracy, sweep.jobs.get(member.name, "-")))
    done = sum(line[1] == "done" for line in lines)
    return f"{aligned(lines)}\n{done} of {len(sweep.members)} done in {sweep.directory}"


def _accuracy(sweep: Sweep, member: Member) -> str:
    accuracy = read_row(sweep.directories(member)[-1] / METRICS).accuracy
    return "-" if accuracy is None else f"{accuracy:.2%}"
