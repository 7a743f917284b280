"""The command ``netslim submit``: a run as a batch job of SLURM."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from netslim.launch.batch.script import Script, batch_script
from netslim.launch.batch.slurm import (
    Shape,
    SlurmConfig,
    describe_flags,
    flag_groups,
    read_slurm_flags,
    sbatch,
    split_flags,
)
from netslim.launch.config import RunConfig, run_directory
from netslim.launch.presets import find_preset, list_presets, read_preset
from netslim.launch.reading import warn_of_unread
from netslim.launch.run import check_batch, check_network, claim

SCRIPT = "submit.sh"


def submit_run(arguments: Sequence[str], description: str) -> int:
    """Check what can be checked here, write the batch script into the run's directory and submit it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: netslim submit PRESET [flags]\n\n{description}\n\n{list_presets()}\n")
        print(describe_flags(SlurmConfig))
        return 0
    preset, *flags = arguments
    (own,), options, rest = split_flags(flags, [SlurmConfig])
    config = read_preset("netslim submit", preset, rest)
    slurm = read_slurm_flags(own, options)
    directory = run_directory(preset, config).absolute()
    text = script_of_run(preset, directory, config, slurm, flags, rest)
    if slurm.dry_run:
        print(text, end="")
        return 0
    shape = Shape.of(slurm, config)
    check_run(config, shape)
    warn_of_unread(find_preset(preset)(), config, of_job(config, shape))
    claim(directory, preset, config)
    job = write_and_submit(directory / SCRIPT, text)
    log = directory / f"slurm-{job}.log"
    print(
        f"job {job}: {preset} in {shape}\nscript  {directory / SCRIPT}\nlog     {log}\n"
        f"follow  tail -F {shlex.quote(str(log))}\nstate   squeue --jobs {job}\nstop    scancel {job}"
    )
    return 0


def check_run(config: RunConfig, shape: Shape) -> None:
    """Raise ValueError for what would only fail once the job runs, as far as it can be seen from a login node."""
    config.record.check_installed()
    check_network(config)
    check_batch(config, shape.world_size)


def of_job(config: RunConfig, shape: Shape) -> dict[str, str]:
    """The fields of processes on one machine that a job says otherwise, and how."""
    found = {"max_restarts": "a job is put back into the queue instead, by --requeues"}
    if config.num_processes not in (None, shape.processes):
        found["num_processes"] = f"the job has {shape.processes} on each node, by its GPUs or --processes-per-node"
    return found


def script_of_run(
    preset: str, directory: Path, config: RunConfig, slurm: SlurmConfig, flags: Sequence[str], run_flags: Sequence[str]
) -> str:
    """The batch script of one run, all stages."""
    script = Script(
        title=f"netslim submit {shlex.join([preset, *flags])}",
        path=directory / SCRIPT,
        job_name=f"netslim-{directory.name}",
        log=directory / "slurm-%j.log",
        directory=Path.cwd(),
    )
    kept = [
        part
        for flag, values in flag_groups(run_flags)
        if not re.match("--run[-_]dir", flag)
        for part in (flag, *values)
    ]
    recipe = shlex.join([preset, *kept, "--run-dir", str(directory)])
    return batch_script(script, slurm, config, [f"run_dir={shlex.quote(str(directory))}", f"recipe=({recipe})"])


def write_and_submit(path: Path, text: str, *options: str) -> str:
    """Keep a script and submit it; returns the job's number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return sbatch(path, *options)
