"""Fixtures that several test files share."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for prepared data that lives as long as the test session: the digits are written once."""
    return tmp_path_factory.mktemp("data_cache")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, too small for any weights."""
    directory = tmp_path / "full"
    directory.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root may mount a small file system")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)
