"""How processes start on this machine: through Accelerate's launcher, on GPUs or as CPU processes."""

import ctypes
import itertools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from netslim.launch.config import RunConfig
from netslim.launch.mistakes import LAUNCHER_VARIABLE, MISTAKE, PREEMPTED, is_rank_0, warn
from netslim.train import LostRankError, asks_for_cpu, check_devices, num_gpus

_OF_A_GROUP = re.compile(
    r"((LOCAL|GROUP)_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|PET_\w+"
    r"|PMI_(RANK|SIZE)|MPI_LOCAL(RANKID|NRANKS)|(OMPI|MV2)_COMM_WORLD_\w+"
)
"""Variables by which launchers (torchrun, Kubernetes, MPI) tell a process its place in a group."""
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


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

    Returns 0, or the exit code of a process that failed by itself; the other processes are ended with it. Raises
    LostRankError, with the ``stage``, where a signal ended a process and no other had the time to say so. After such
    failures, which may not come again, all are started anew, up to ``max_restarts`` times. A signal to this process
    goes to all of them, and they have half a minute to save. On the CPU (``ACCELERATE_USE_CPU=1`` or no GPU) the cores
    are divided among the processes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    command = ["--module", module, *arguments]

    def start_all() -> None:
        if num_processes == 1 and not zero:  # which Accelerate starts with nothing that watches it
            parsed = torchrun.get_args_parser().parse_args(["--standalone", "--nproc-per-node", "1", *command])
            start: Callable[[Any], None] = torchrun.run
        else:
            flags = launcher_flags(num_processes=num_processes, num_machines=1, zero=zero, precision=precision)
            port = ("--main_process_port", "0")  # a free one
            parsed, start = launch_command_parser().parse_args([*flags, *port, *command]), launch_command
        parsed.signals_to_handle = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # for which Accelerate has no flag
        start(parsed)

    # The launcher reports a failed process with a traceback of its own, after the process has said what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    # Not by the launcher's own --max_restarts: it would start a run again that was preempted or has a mistake, and
    # its store would give the new processes the addresses of the dead ones.
    for _ in range(max_restarts):
        try:
            code = _launch_once(start_all, stage, was_preempted)
            if code in (0, MISTAKE, PREEMPTED) or code > 128:
                return code
        except LostRankError as error:
            print(f"netslim: {error}", file=sys.stderr)
        print("netslim: all processes are started again, and go on from the last checkpoint", file=sys.stderr)
    return _launch_once(start_all, stage, was_preempted)


def launcher_flags(*, num_processes: int, num_machines: int, zero: int, precision: str) -> list[str]:
    """What `accelerate launch` is told about the processes, ``num_processes`` of them over all machines."""
    kind = ("--use_deepspeed", "--zero_stage", str(zero)) if zero else ("--multi_gpu",) * (num_processes > 1)
    count = ("--num_processes", str(num_processes), "--num_machines", str(num_machines))
    # the launcher would print a line about each that is not given
    return [*kind, *count, "--mixed_precision", precision, "--dynamo_backend", "no"]


def _launch_once(start_all: Callable[[], None], stage: Callable[[], str], was_preempted: Callable[[], bool]) -> int:
    try:
        start_all()
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if max(codes) > 0:
            return max(codes)
        rank, failure = error.get_first_failure()
        raise LostRankError(f"{stage()}: {signal.Signals(-failure.exitcode).name} ended rank {rank}") from None
    except SignalException as error:  # the launcher was told to stop, and has ended its processes
        return PREEMPTED if was_preempted() else 128 + int(error.sigval)
    return 0


def end_with_launcher() -> None:
    """Have the system send SIGTERM to this process when its launcher ends, however that is: nothing outlives a run.

    A rank that has joined the others then saves first; one that waits for them just ends. Started by hand, without a
    launcher, it is left alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ.get(LAUNCHER_VARIABLE, os.getppid())):  # it ended while this process was starting
        os.kill(os.getpid(), signal.SIGTERM)


def is_of_netslim() -> bool:
    """Whether netslim itself started this process, and says at the end what the run came to."""
    return LAUNCHER_VARIABLE in os.environ


def of_launcher(config: RunConfig) -> dict[str, str]:
    """The fields that say to `netslim` what another launcher was told by its own flags, and how that differs."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    found = {"max_restarts": "the launcher has its own"}
    if config.num_processes not in (None, started):
        found["num_processes"] = f"the launcher started {started}"
    return found


def warn_of_overruled(config: RunConfig) -> None:
    """Say which choices of a launcher, which Accelerate passes on by the environment, the configuration overrules."""
    clips: set[object] = {config.sparsify.clip, config.finetune.clip}
    own: dict[str, tuple[str, set[object]]] = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("engine.accumulation", {config.engine.accumulation}),
        "ACCELERATE_GRADIENT_CLIPPING": ("sparsify.clip and finetune.clip", clips),
        # without one of ours the launcher's is taken
        **({"ACCELERATE_DEEPSPEED_ZERO_STAGE": ("engine.zero", {config.engine.zero})} if config.engine.zero else {}),
    }
    told = [
        f"{variable} {os.environ[variable]} (by {fields} {' and '.join(map(str, values))})"
        for variable, (fields, values) in own.items()
        if variable in os.environ and {os.environ[variable]} != {*map(str, values)}
    ]
    if told and is_rank_0():
        warn(f"the configuration overrules {', '.join(told)}")


def warn_of_missing_processes() -> None:
    """Say where `accelerate launch` started fewer processes than its flags or its file ask for, which it does not."""
    asked, started = _processes_asked_for(), int(os.environ.get("WORLD_SIZE", "1"))
    if asked is None or asked <= started or not is_rank_0():
        return
    remedy = (
        "several on the CPU need --multi_gpu too, or in its file distributed_type: MULTI_GPU, as in "
        "launch/accelerate/cpu.yaml"
        if started == 1
        else "each machine gets its whole share: give a multiple of the number of machines"
    )
    warn(f"accelerate launch was asked for {asked} processes and started {started}; {remedy}")


def _processes_asked_for() -> int | None:
    """What `accelerate launch` was told, by its flags or else its file; None where it did not start this process."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    names = [Path(word).name for word in words]
    starts = [i + 1 for i, name in enumerate(names) if name in ("accelerate-launch", "accelerate.commands.launch")]
    starts += [i + 2 for i, pair in enumerate(itertools.pairwise(names)) if pair == ("accelerate", "launch")]
    if not starts:
        return None
    launched = launch_command_parser().parse_args(words[min(starts) :])
    if launched.num_processes is None and (
        launched.config_file or (Path(default_config_file).is_file() and not launched.cpu)
    ):
        return int(load_config_from_file(launched.config_file).num_processes)
    return None if launched.num_processes is None else int(launched.num_processes)


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors on the CPU free, for those of the next step.

    By itself glibc gives large blocks back to the system, which hands them out again page by page, each filled with
    zeros. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # the most that it takes
    mallopt(_M_TOP_PAD, 64 << 20)


def ignore_other_launchers() -> None:
    """Forget, with one line, what another launcher left in the environment: a run would wait for ranks of that group.

    For processes that start their own; those of ``python -m netslim.launch.recipe`` join by these variables.
    """
    found = sorted(name for name in os.environ if _OF_A_GROUP.fullmatch(name))
    if not found:
        return
    for name in found:
        del os.environ[name]
    warn(
        f"ignores {', '.join(found)} of the environment, since it starts its processes itself; "
        "under a launcher use python -m netslim.launch.recipe"
    )


@cache
def warn_of_cpu() -> None:
    """Say, once, that what could have run on GPUs runs on the CPU, and who says so."""
    why = "ACCELERATE_USE_CPU asks for that" if asks_for_cpu() else "torch finds no GPU"
    warn(f"computes on the CPU: {why}; with --cpu that is meant")


def count_processes(config: RunConfig) -> int:
    """How many processes a run has on this machine, for whoever starts them; raises ValueError where that cannot be."""
    ignore_other_launchers()
    if config.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    elif not num_gpus():
        warn_of_cpu()
    num_processes = config.num_processes or max(1, num_gpus())
    check_devices(config.engine, num_processes)
    return num_processes
