"""The command ``netslim``: checks everything that can be checked, then starts the processes."""

import difflib
import sys
from collections.abc import Callable, Sequence
from functools import partial

from netslim.data import prepare
from netslim.launch.batch import submit_run
from netslim.launch.compare import compare_runs
from netslim.launch.config import RunConfig, run_directory
from netslim.launch.export import export_run
from netslim.launch.inspect import inspect_run
from netslim.launch.mistakes import LOST_RANK, end_at_once, guarded
from netslim.launch.presets import list_presets, read_preset
from netslim.launch.recipe import COMMANDS_VARIABLE
from netslim.launch.run import (
    check_batch,
    check_network,
    claim,
    commands_of,
    count_processes,
    format_table,
    is_complete,
    read_rows,
    run_recipe,
    stages_of,
    start,
)
from netslim.launch.sweep import sweep_runs

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
_WITH_OWN_FLAGS: dict[str, Callable[[Sequence[str], str], int]] = {
    "export": export_run,
    "submit": submit_run,
    "sweep": partial(sweep_runs, compare=compare_runs),
    "compare": compare_runs,
}


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
    if command == "inspect":
        return inspect_run(preset, flags, COMMANDS[command])
    config = read_preset(f"netslim {command}", preset, flags)
    if command == "data":
        return write_data(config)
    return run_stages(preset, config, commands_of(command, config), flags)


def run_stages(preset: str, config: RunConfig, commands: Sequence[str], flags: Sequence[str]) -> int:
    """Check, start the processes, wait for them, print the table."""
    num_processes = count_processes(config)
    check_network(config)
    check_batch(config, num_processes)
    directory = run_directory(preset, config)
    claim(directory, preset, config)
    paths = [stage.directory(directory) for stage in stages_of(commands, config)]

    def at_work() -> str:
        return next((path.name for path in paths if not is_complete(path)), "the end")

    if not all(is_complete(path) for path in paths):
        prepare(config.data, quiet=False)
        work, environment = partial(run_recipe, commands=commands), {COMMANDS_VARIABLE: " ".join(commands)}
        code = start("netslim.launch.recipe", preset, flags, config, work, at_work, environment)
        if code:
            return code
    print(format_table(read_rows(directory)))
    print(f"{directory}/results.json")
    return 0


def write_data(config: RunConfig) -> int:
    info = prepare(config.data, quiet=False)
    for note in info.notes:
        print(f"netslim: warning: {note}", file=sys.stderr)
    where = info.directory or f"nothing to write: loader {info.loader} reads the images themselves"
    print(f"{info.num_train} training and {info.num_test} test images of {len(info.classes)} classes: {where}")
    return 0


def overview() -> str:
    commands = "\n".join(
        f"  netslim {name} {_SUBJECTS.get(name, 'PRESET')} [flags]".ljust(39) + text for name, text in COMMANDS.items()
    )
    usage = "usage: netslim COMMAND PRESET [flags]"
    return f"{usage}\n\n{commands}\n\n{list_presets()}\n\nnetslim COMMAND PRESET --help lists all flags."
