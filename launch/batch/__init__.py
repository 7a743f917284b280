"""Runs as jobs of SLURM.

A configuration and what a job needs come in; a readable batch script and a job's number come out. How sbatch's options
are read and quoted, and what a script does when its time runs out, is nobody else's business.
"""

from netslim.launch.batch.script import Script, batch_script, command_script
from netslim.launch.batch.slurm import (
    Shape,
    SlurmConfig,
    cancel,
    control,
    describe_flags,
    queued,
    read_slurm_flags,
    split_flags,
)
from netslim.launch.batch.submit import check_run, submit_run, write_and_submit

__all__ = [
    "Script",
    "Shape",
    "SlurmConfig",
    "batch_script",
    "cancel",
    "check_run",
    "command_script",
    "control",
    "describe_flags",
    "queued",
    "read_slurm_flags",
    "split_flags",
    "submit_run",
    "write_and_submit",
]
