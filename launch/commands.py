"""What each command of ``netslim`` does: checks everything that can be checked, then starts the processes."""

from collections.abc import Callable, Sequence
from functools import partial

from netslim.data import prepare
from netslim.launch.batch import submit_run
from netslim.launch.compare import compare_runs
from netslim.launch.config import RunConfig, run_directory, to_yaml
from netslim.launch.export import export_run
from netslim.launch.help import DRY_RUN
from netslim.launch.inspect import foresee, inspect_run
from netslim.launch.mistakes import warn
from netslim.launch.presets import read_preset
from netslim.launch.recipe import COMMANDS_VARIABLE
from netslim.launch.run import (
    check_batch,
    check_network,
    claim,
    commands_of,
    count_processes,
    format_results,
    is_complete,
    read_target,
    run_recipe,
    stages_of,
    start,
)
from netslim.launch.sweep import sweep_runs

_WITH_OWN_FLAGS: dict[str, Callable[[Sequence[str], str], int]] = {
    "export": export_run,
    "submit": submit_run,
    "sweep": partial(sweep_runs, compare=compare_runs),
    "compare": compare_runs,
}


def carry_out(command: str, about: str, arguments: Sequence[str]) -> int:
    """Carry out one of the commands; raises ValueError or OSError for a mistake in its arguments."""
    if command in _WITH_OWN_FLAGS:
        return _WITH_OWN_FLAGS[command](arguments, about)
    target, *flags = arguments
    if command == "inspect":
        return inspect_run(target, flags)
    if command == "config":
        print(to_yaml(read_target("netslim config", target, flags)[1]), end="")
        return 0
    if command == "data":
        return write_data(read_preset("netslim data", target, flags, is_run=False))
    own = [flag for flag in flags if flag != DRY_RUN]
    config = read_preset(f"netslim {command}", target, own)
    commands = commands_of(command, config)
    if DRY_RUN in flags:
        print(foresee(f"netslim {command}", target, config, commands))
        return 0
    return run_stages(target, config, commands, own)


def run_stages(preset: str, config: RunConfig, commands: Sequence[str], flags: Sequence[str]) -> int:
    """Check, start the processes, wait for them, print the table."""
    num_processes = count_processes(config)
    config.record.check_installed()
    check_network(config)
    check_batch(config, num_processes)
    directory = run_directory(preset, config)
    claim(directory, preset, config)
    paths = [stage.directory(directory) for stage in stages_of(commands, config)]

    def at_work() -> str:
        return next((path.name for path in paths if not is_complete(path)), "the end")

    done = [path.name for path in paths if is_complete(path)]
    if done:
        print(f"done already, {len(done)} of {len(paths)} stages: {', '.join(done)}", flush=True)
    if len(done) < len(paths):
        prepare(config.data, quiet=False)
        work, environment = partial(run_recipe, commands=commands), {COMMANDS_VARIABLE: " ".join(commands)}
        code = start("netslim.launch.recipe", preset, flags, config, work, at_work, environment)
        if code:
            return code
    print(format_results(directory))
    return 0


def write_data(config: RunConfig) -> int:
    """Write the images of a configuration where they are not written yet."""
    info = prepare(config.data, quiet=False)
    for note in info.notes:
        warn(note)
    where = info.directory or f"nothing to write: loader {info.loader} reads the images themselves"
    print(f"{info.num_train} training and {info.num_test} test images of {len(info.classes)} classes: {where}")
    return 0
