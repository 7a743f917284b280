"""One writer at a time, over processes and over the nodes of a shared disk."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What file systems without locks answer (Lustre mounted without `flock`, some FUSE mounts).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file `path`, made where missing; waits for whoever holds it, or raises BlockingIOError.

    Yields False where the file system has no locks: then only the atomic rename keeps writers apart.
    The file stays behind, for removing it would let two processes hold two locks of one name.
    """
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held = False
        yield held


def is_held(path: Path) -> bool:
    """Whether another process holds the lock file `path`, as far as this machine can see; it is only read."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # also one that is not there or may not be read, and a file system without locks
        return isinstance(error, BlockingIOError)
    return False
