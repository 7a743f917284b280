"""All stages of a run, in this process and those that a launcher has started with it.

accelerate launch -m netslim.launch.recipe PRESET [--prune.ratio 0.7 ...]
"""

import os
import sys

from netslim.launch.mistakes import guarded
from netslim.launch.run import COMMANDS, Job, enter, format_results, is_of_netslim, run_recipe

COMMANDS_VARIABLE = "NETSLIM_STAGES"
"""By which `netslim prune` and the like say whose stages they mean."""


def main() -> int:
    """The entry of ``python -m netslim.launch.recipe PRESET [flags]``, under any launcher or none."""

    def work(job: Job) -> None:
        run_recipe(job, os.environ.get(COMMANDS_VARIABLE, " ".join(COMMANDS)).split())
        if job.run.is_main and not is_of_netslim():
            print(format_results(job.directory), flush=True)

    return guarded(lambda: enter("netslim.launch.recipe", __doc__ or "", work))


if __name__ == "__main__":
    sys.exit(main())
