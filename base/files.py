"""Files that are whole or not there, also after a power cut."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def write_flushed(path: Path, content: bytes) -> None:
    """Write a new file, and wait until it is on the disk; raises FileExistsError where there is one."""
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:  # which names no file by itself
            error.filename = str(path)
            raise


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk, before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_all(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files so that a failure leaves none of them, and no part of one, behind."""
    drafts = {name: directory / f".{name}.{secrets.token_hex(4)}" for name in contents}
    try:
        for name, draft in drafts.items():
            write_flushed(draft, contents[name])
        for name, draft in drafts.items():
            draft.replace(directory / name)
        flush(directory)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
