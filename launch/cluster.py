"""How processes start on this machine: through Accelerate's launcher, on GPUs or as CPU processes."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    num_processes: int,
    zero: int,
    max_restarts: int,
    stage: Callable[[], str],
) -> int:
    """Run ``python -m module arguments`` in ``num_processes`` processes on this machine, as one group.

    Returns the exit code of the process that failed first, or 0. The other processes are ended with it, and all are
    started again up to ``max_restarts`` times. Where a signal ended a process, says which, and during which ``stage``.
    On the CPU (``ACCELERATE_USE_CPU=1`` or no GPU) the cores are divided among the processes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    launcher_arguments = [
        *(("--use_deepspeed", "--zero_stage", str(zero)) if zero else ("--multi_gpu",)),
        *("--num_processes", str(num_processes), "--num_machines", "1"),
        *("--main_process_port", "0"),  # a free one
        *("--max_restarts", str(max_restarts)),
        # netslim decides these itself; the launcher would print a line about each that is not given
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--module", module, *arguments),
    ]
    # The launcher reports a failed process with a traceback of its own, after the process has said what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(launcher_arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        line = f"netslim: {stage()}: {name} ended rank {rank}; the same command goes on from the last checkpoint"
        print(line, file=sys.stderr, flush=True)
        return 1
    except SignalException as error:  # the launcher was told to stop, and has ended its processes
        return 128 + int(error.sigval)
    return 0
