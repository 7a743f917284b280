"""A user's mistake ends in one line on stderr and exit code 2; anything else is ours and keeps its traceback."""

import io
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EEXIST, ENOENT, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path
from typing import NoReturn

LAUNCHER_VARIABLE = "NETSLIM_LAUNCHER"
"""By which netslim's own processes know the command that started them, and speaks for them."""
MISTAKE = 2
PREEMPTED = 3
LOST_RANK = 1
INTERRUPTED = 130
UNREAD = 141
"""As a shell counts SIGPIPE: nobody reads what is printed any more."""
_NOT_TO_BE_WRITTEN = (EACCES, EPERM, EROFS, ENOENT, ENOTDIR, EEXIST)


def guarded(body: Callable[[], int | None], rank: int | None = None) -> int:
    """Run ``body`` and return the process's exit code; ``rank`` None is what a launcher says that this process is.

    ValueError, FloatingPointError or OSError raised by netslim's own code, and OSError raised by the operating
    system, are the user's to mend; the same types from inside a library are a defect of ours and are raised on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # what an ASCII terminal lacks is spelt out, as it is on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return body() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, FloatingPointError, OSError) as error:
        if not _is_mistake(error):
            raise
        if not getattr(error, "is_echo", False):  # of an error that another rank reports
            where = f" (rank {_rank(rank)})" if _rank(rank) else ""
            print(f"netslim: {_one_line(error)}{where}", file=sys.stderr, flush=True)
        return MISTAKE
    except Exception as error:
        return _after_training(error, _rank(rank))


def is_rank_0() -> bool:
    """Whether this process is the one, by its launcher's word, that says what all ranks find."""
    return os.environ.get("RANK", "0") == "0"


def warn(line: str) -> None:
    """Say what a user should know of a command that goes on all the same."""
    print(f"netslim: warning: {line}", file=sys.stderr, flush=True)


def _after_training(error: Exception, rank: int) -> int:
    """The exit code where a rank was lost, or a signal told the run to end; raises anything else again."""
    from netslim.train import LostRankError, Preempted  # here: its import takes seconds, which help does not have

    if isinstance(error, LostRankError):
        print(f"netslim: {error}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        end_at_once(LOST_RANK)
    if not isinstance(error, Preempted):
        raise error
    if rank == 0:
        print(f"netslim: {error}; the same command goes on from there", file=sys.stderr, flush=True)
    # a launcher that may restart takes every other code for a failure, and would
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        return 0
    # a batch script, which looks for the mark in the run's directory, spares its log the launcher's traceback
    return int(os.environ.get("NETSLIM_PREEMPTED_CODE", PREEMPTED))


@contextmanager
def naming(flag: str, directory: Path) -> Iterator[None]:
    """Say of a folder that cannot be written which flag names another one."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_TO_BE_WRITTEN or error.filename is None:  # without a name it is said already
            raise
        why = f"{directory} cannot be written ({error.strerror}); name another folder with {flag}"
        raise OSError(error.errno, why) from error


def end_at_once(code: int) -> NoReturn:
    """End a process without what is tidied up at the end, which takes seconds and may wait for a lost rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _remedy(error: OSError) -> str:
    """What helps where a disk is full, and has not been said yet."""
    if error.errno != ENOSPC or "free some" in str(error):
        return ""
    free = ""
    if error.filename is not None and "are free" not in str(error):
        place = next(path for path in Path(error.filename).absolute().parents if path.is_dir())
        free = f", {shutil.disk_usage(place).free / 2**20:,.1f} MiB are free"
    return f"{free}; free some, or use another --run-dir"


def _rank(own: int | None) -> int:
    return int(os.environ.get("RANK", "0")) if own is None else own


def _is_mistake(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith(("netslim.", "__main__"))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}{_remedy(error)}"
    return " ".join(str(error).split())
