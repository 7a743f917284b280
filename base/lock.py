"""One writer at a time, over processes and over the nodes of a shared disk."""

import errno
import fcntl
import os
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
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held = False
        yield held
    finally:
        os.close(handle)
