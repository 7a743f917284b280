"""The entry of ``python -m netslim.launch.sweep SWEEP MEMBER...``: these members, in this group of processes."""

import sys
from functools import partial
from pathlib import Path

from netslim.launch.mistakes import guarded, is_rank_0
from netslim.launch.run import end_with_launcher, run_recipe, work_each
from netslim.launch.sweep.grid import Sweep


def run_named() -> None:
    """Run the members that the command line names, one after the other."""
    directory, *names = sys.argv[1:]
    end_with_launcher()
    sweep = Sweep.read(Path(directory))
    members = [member for member in sweep.members if member.name in names]
    runs = [(sweep.config_of(member), partial(run_recipe, commands=sweep.commands(member))) for member in members]
    try:
        work_each(sweep.preset, runs)
    except (ValueError, FloatingPointError, OSError) as error:
        if is_rank_0():
            sweep.note_failure(members, " ".join(str(error).split()))
        raise


if __name__ == "__main__":
    sys.exit(guarded(run_named))
