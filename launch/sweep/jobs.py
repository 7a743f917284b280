"""A sweep as jobs of SLURM: an array that trains the sparse models, one that prunes and fine-tunes, a comparison."""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from netslim.launch.batch import (
    Script,
    Shape,
    SlurmConfig,
    batch_script,
    cancel,
    check_run,
    command_script,
    control,
    queued,
    read_slurm_flags,
    split_flags,
    write_and_submit,
)
from netslim.launch.sweep.grid import Member, Sweep

COMPARISON = "comparison"
"""Under which the index keeps its job."""


def submit_members(sweep: Sweep, flags: Sequence[str], limit: int | None) -> int:
    """Submit what is neither done nor in the queue; a ratio waits for its sparse model, the comparison for all.

    ``flags`` are the jobs' own and sbatch's; without any those of the last submission are taken.
    """
    sweep.slurm = list(flags or sweep.slurm)
    (own,), options, _ = split_flags(sweep.slurm, [SlurmConfig])
    slurm = read_slurm_flags(own, options)
    if any(option.startswith("--dependency") for option in options):
        raise ValueError("--dependency is what the jobs of a sweep have of their own; leave it out")
    models = [member for member in sweep.members if member.ratio is None]
    slims = [member for member in sweep.members if member.ratio is not None]
    texts = {
        "sparse": array_script(sweep, slurm, "sparse", models),
        "slim": array_script(sweep, slurm, "slim", slims),
        "compare": comparison_script(sweep, slurm),
    }
    if slurm.dry_run:
        print("\n".join(texts.values()), end="")
        return 0
    check_run(sweep.base, Shape.of(slurm, sweep.base))
    queue = queued()
    todo = {m for m in sweep.members if not sweep.is_done(m) and sweep.jobs.get(m.name) not in queue}
    sweep.make(todo)
    sweep.write()
    paths = {name: _jobs_directory(sweep) / f"{name}.sh" for name in texts}
    most = "" if limit is None else f"%{limit}"

    def submit_array(name: str, members: Sequence[Member], *options: str) -> str | None:
        indices = [str(index) for index, member in enumerate(members) if member in todo]
        if not indices:
            return None
        job = write_and_submit(paths[name], texts[name], f"--array={','.join(indices)}{most}", *options)
        sweep.jobs |= {members[int(index)].name: f"{job}_{index}" for index in indices}
        sweep.write()
        return job

    submit_array("sparse", models)
    # held, until each of them knows which sparse model it waits for; where that fails it is never run
    slim_array = submit_array("slim", slims, "--hold", "--kill-on-invalid-dep=yes")
    if slim_array is not None:
        _release(sweep, slim_array, [member for member in slims if member in todo])
    if todo:
        arrays = dict.fromkeys(
            sweep.jobs[member.name].split("_")[0] for member in sweep.members if not sweep.is_done(member)
        )
        sweep.jobs[COMPARISON] = write_and_submit(
            paths["compare"], texts["compare"], f"--dependency=afterany:{':'.join(arrays)}"
        )
        sweep.write()
    print(_summary(sweep, todo))
    return 0


def _release(sweep: Sweep, array: str, members: Sequence[Member]) -> None:
    try:
        for member in members:
            if not sweep.is_done(member.sparse):
                needs = sweep.jobs[member.sparse.name]
                control("update", f"JobId={sweep.jobs[member.name]}", f"Dependency=afterok:{needs}")
        control("release", array)
    except ValueError:
        cancel(array)
        raise


def _summary(sweep: Sweep, todo: Collection[Member]) -> str:
    again = f"netslim sweep {shlex.quote(str(sweep.directory))}"
    if not todo:
        return (
            f"nothing to submit: all {len(sweep.members)} members are done or in the queue\nstate    {again} --status"
        )
    models = sum(member.ratio is None for member in todo)
    return (
        f"{models} sparse models to train, {len(todo) - models} to prune and fine-tune after them, and a comparison\n"
        f"state    {again} --status\nlogs     {shlex.quote(str(_jobs_directory(sweep)))}\n"
        f"again    {again} --slurm    (what failed, alone)\n"
        f"stop     scancel {' '.join(dict.fromkeys(job.split('_')[0] for job in sweep.jobs.values()))}"
    )


def array_script(sweep: Sweep, slurm: SlurmConfig, name: str, members: Sequence[Member]) -> str:
    """The batch script of an array, a member of the sweep for each index."""
    directory = shlex.quote(str(sweep.directory))
    which = [
        f"members=({shlex.join(member.name for member in members)})",
        f'run_dir={directory}/"${{members[SLURM_ARRAY_TASK_ID]}}"',
        f'recipe=({shlex.quote(sweep.preset)} --config "$run_dir/config.json" --run-dir "$run_dir")',
        "unset WANDB_RUN_ID  # it would name one run, and these are many",
    ]
    if name == "sparse":
        which.append("export NETSLIM_STAGES=sparsify")
    return batch_script(_script(sweep, name, "%A_%a"), slurm, sweep.base, which)


def comparison_script(sweep: Sweep, slurm: SlurmConfig) -> str:
    """The batch script of the comparison."""
    return command_script(_script(sweep, "compare", "%j"), slurm, ["netslim", "compare", str(sweep.directory)])


def _script(sweep: Sweep, name: str, number: str) -> Script:
    directory = _jobs_directory(sweep)
    return Script(
        title=f"{name}: netslim sweep {shlex.quote(str(sweep.directory))} --slurm",
        path=directory / f"{name}.sh",
        job_name=f"netslim-{sweep.directory.name}-{name}",
        log=directory / f"{name}-{number}.log",
        directory=Path.cwd(),
    )


def _jobs_directory(sweep: Sweep) -> Path:
    return sweep.directory / "slurm"
