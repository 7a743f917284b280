"""The command ``netslim``: checks everything that can be checked, then starts the processes."""

import difflib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from netslim.data import check_batch_size, prepare
from netslim.launch.artefacts import (
    PREEMPTED_MARK,
    claim,
    is_complete,
    read_json,
    stage_directories,
    stage_directory,
)
from netslim.launch.cluster import count_processes, launch
from netslim.launch.compare import compare_runs
from netslim.launch.config import RunConfig, parse, run_directory
from netslim.launch.describe import describe, preset_of_run
from netslim.launch.export import export_run
from netslim.launch.inspection import INSPECTION, PICTURE, format_inspection, largest_ratio
from netslim.launch.mistakes import LOST_RANK, end_at_once, guarded
from netslim.launch.presets import PRESETS, find_preset, list_presets
from netslim.launch.recipe import stages_of, start
from netslim.launch.report import format_table, read_rows
from netslim.launch.submit import submit_run
from netslim.launch.sweep import sweep_runs
from netslim.train import check_model

COMMANDS = {
    "run": "all stages on this machine: sparsity training, pruning, repair, fine-tuning",
    "sparsify": "sparsity training only",
    "prune": "cut the run's sparse model by the global threshold, at each ratio",
    "repair": "restore the run's cut models, with no training step",
    "finetune": "fine-tune the run's repaired models",
    "submit": "all stages as a batch job of SLURM",
    "sweep": "a grid of lambdas, ratios and seeds, here or as jobs of SLURM",
    "compare": "runs side by side: table, figures, and which network to take",
    "inspect": "which channels can go, and why the others stay; of a run directory also what its sparse model bears",
    "data": "write the images of a preset as .beton files",
    "export": "write a run's slim model as ONNX, pt2 or stand-alone weights",
}
_SUBJECTS = {"export": "RUN", "compare": "RUN...", "sweep": "PRESET|SWEEP"}
_WITH_OWN_FLAGS = {"export": export_run, "submit": submit_run, "sweep": sweep_runs, "compare": compare_runs}


def main() -> int:
    """The console script."""
    code = guarded(lambda: dispatch(sys.argv[1:]))
    if code == LOST_RANK:
        end_at_once(code)
    return code


def dispatch(arguments: Sequence[str]) -> int:
    """Carry out one command line; raises ValueError or OSError for a mistake in it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=2, cutoff=0.3) or list(COMMANDS)
        raise ValueError(f"no command is called {command!r}; the nearest are {', '.join(nearest)}")
    if command in _WITH_OWN_FLAGS:
        return _WITH_OWN_FLAGS[command](rest, COMMANDS[command])
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: netslim {command} PRESET [flags]\n\n{COMMANDS[command]}\n\n{list_presets()}")
        return 0
    preset, *flags = rest
    if command == "inspect" and preset not in PRESETS and Path(preset).is_dir():
        return inspect_run(Path(preset), flags)
    make = find_preset(preset)
    config = parse(f"netslim {command} {preset}", inspect.getdoc(make) or "", make(), flags)
    if command == "data":
        return write_data(config)
    if command == "inspect":
        print(describe(config))
        return 0
    return run_stages(preset, config, stages_of(command, config), [preset, *flags])


def run_stages(preset: str, config: RunConfig, stages: Sequence[str], arguments: Sequence[str]) -> int:
    """Check, start the processes, wait for them, print the table."""
    num_processes = count_processes(config)
    check_model(config.model)
    check_batch_size(config.data.batch_size, num_processes, config.engine.accumulation)
    directory = run_directory(preset, config)
    claim(directory, preset, config)
    if not all(is_complete(path) for path in stage_directories(directory, stages, config)):
        prepare(config.data, quiet=False)
        code = start_processes(preset, config, stages, arguments, num_processes)
        if code:
            return code
    print(format_table(read_rows(directory)))
    print(f"{directory}/results.json")
    return 0


def inspect_run(run: Path, flags: Sequence[str]) -> int:
    """Print the channels of a run's network, and, where its sparse model is there, what that can bear."""
    preset = preset_of_run(run)
    flags = ["--config", f"{run}/config.json", "--run-dir", str(run), *flags]
    config = parse(f"netslim inspect {run}", COMMANDS["inspect"], find_preset(preset)(), flags)
    is_trained = is_complete(stage_directory(run, "sparsify"))
    print(describe(config, is_trained=is_trained), flush=True)
    if not is_trained:
        return 0
    code = start_processes(preset, config, ["inspect"], [preset, *flags], count_processes(config))
    if not code:
        from netslim.launch.figures import draw_inspection  # here: matplotlib is imported for no other command

        found = read_json(run / INSPECTION)
        print(f"\n{format_inspection(found, config.inspect.loss)}\n{run / INSPECTION}")
        draw_inspection(found, largest_ratio(found, config.inspect.loss), run / PICTURE)
        print(run / PICTURE)
    return code


def start_processes(
    preset: str, config: RunConfig, stages: Sequence[str], arguments: Sequence[str], num_processes: int
) -> int:
    """Run the stages here, or in several processes under Accelerate's launcher; returns the exit code."""
    if num_processes == 1 and not (config.engine.zero or config.max_restarts):
        start(preset, config, stages)
        return 0
    os.environ["NETSLIM_STAGES"] = " ".join(stages)
    directory = run_directory(preset, config)

    def stage() -> str:
        left = (path.name for path in stage_directories(directory, stages, config) if not is_complete(path))
        return next(left, "the end")

    return launch(
        "netslim.launch.recipe",
        arguments,
        num_processes=num_processes,
        zero=config.engine.zero,
        precision=config.engine.precision,
        max_restarts=config.max_restarts,
        stage=stage,
        was_preempted=(directory / PREEMPTED_MARK).is_file,
    )


def write_data(config: RunConfig) -> int:
    info = prepare(config.data, quiet=False)
    where = info.directory or f"nothing to write: loader {info.loader} reads the images themselves"
    print(f"{info.num_train} training and {info.num_test} test images of {len(info.classes)} classes: {where}")
    return 0


def overview() -> str:
    commands = "\n".join(
        f"  netslim {name} {_SUBJECTS.get(name, 'PRESET')} [flags]".ljust(39) + text for name, text in COMMANDS.items()
    )
    usage = "usage: netslim COMMAND PRESET [flags]"
    return f"{usage}\n\n{commands}\n\n{list_presets()}\n\nnetslim COMMAND PRESET --help lists all flags."
