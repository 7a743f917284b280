"""One run: its stages, its directory, and the processes that do its work.

A configuration and images come in; a directory of finished stages comes out, each complete or absent. What a stage
shares with others (the job), and how it is evaluated, recorded and written, is nobody else's business.
"""

from netslim.launch.run.directory import (
    FAILED_MARK,
    INPUT,
    METRICS,
    PREEMPTED_MARK,
    STOP_MARK,
    check_same,
    claim,
    config_of_run,
    is_complete,
    is_occupied,
    preset_of_run,
    read_config,
    read_json,
    why_failed,
    write_json,
)
from netslim.launch.run.job import Job
from netslim.launch.run.processes import count_processes, end_with_launcher, is_of_netslim, launch, launcher_flags
from netslim.launch.run.recipe import commands_of, rehearse_cuts, run_recipe, stages_of
from netslim.launch.run.results import format_results, format_table, read_row, read_rows
from netslim.launch.run.stage import (
    COMMANDS,
    SPARSE,
    STAGE_NAMES,
    TRAINED,
    Kind,
    Pass,
    Stage,
    StageName,
    passes_to,
)
from netslim.launch.run.starting import check_batch, check_network, enter, read_target, start, work_each

__all__ = [
    "COMMANDS",
    "FAILED_MARK",
    "INPUT",
    "METRICS",
    "PREEMPTED_MARK",
    "SPARSE",
    "STAGE_NAMES",
    "STOP_MARK",
    "TRAINED",
    "Job",
    "Kind",
    "Pass",
    "Stage",
    "StageName",
    "check_batch",
    "check_network",
    "check_same",
    "claim",
    "commands_of",
    "config_of_run",
    "count_processes",
    "end_with_launcher",
    "enter",
    "format_results",
    "format_table",
    "is_complete",
    "is_occupied",
    "is_of_netslim",
    "launch",
    "launcher_flags",
    "passes_to",
    "preset_of_run",
    "read_config",
    "read_json",
    "read_row",
    "read_rows",
    "read_target",
    "rehearse_cuts",
    "run_recipe",
    "stages_of",
    "start",
    "why_failed",
    "work_each",
    "write_json",
]
