"""How processes start on this machine: through Accelerate's launcher, on GPUs or as CPU processes."""

import logging
import os
import signal
from collections.abc import Callable, Sequence

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from netslim.launch.mistakes import PREEMPTED
from netslim.train import LostRankError


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    num_processes: int,
    zero: int,
    precision: str,
    max_restarts: int,
    stage: Callable[[], str],
    was_preempted: Callable[[], bool],
) -> int:
    """Run ``python -m module arguments`` in ``num_processes`` processes on this machine, as one group.

    Returns the exit code of the process that failed first, or 0. The other processes are ended with it, and all are
    started again up to ``max_restarts`` times. Raises LostRankError where a signal ended a process, with the ``stage``.
    A signal to this process goes to all of them, and they have half a minute to save. On the CPU
    (``ACCELERATE_USE_CPU=1`` or no GPU) the cores are divided among the processes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    launcher_arguments = [
        *(("--use_deepspeed", "--zero_stage", str(zero)) if zero else ("--multi_gpu",)),
        *("--num_processes", str(num_processes), "--num_machines", "1"),
        *("--main_process_port", "0"),  # a free one
        *("--max_restarts", str(max_restarts)),
        # the launcher would print a line about each that is not given
        *("--mixed_precision", precision, "--dynamo_backend", "no"),
        *("--module", module, *arguments),
    ]
    # The launcher reports a failed process with a traceback of its own, after the process has said what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        parsed = launch_command_parser().parse_args(launcher_arguments)
        # torchrun has a flag for it, Accelerate none
        parsed.signals_to_handle = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        # A store that is kept over restarts, as Accelerate's static rendezvous does and torch's own unless told not to,
        # would give new processes the addresses of dead ones.
        parsed.rdzv_backend, parsed.rdzv_endpoint = "c10d", "localhost:0"
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        launch_command(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise LostRankError(f"{stage()}: {name} ended rank {rank}") from None
    except SignalException as error:  # the launcher was told to stop, and has ended its processes
        return PREEMPTED if was_preempted() else 128 + int(error.sigval)
    return PREEMPTED if was_preempted() else 0
