"""Fixtures that several test files share."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netslim.launch.cli import dispatch
from netslim.launch.mistakes import guarded


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for prepared data that lives as long as the test session: the digits are written once."""
    return tmp_path_factory.mktemp("data_cache")


@pytest.fixture
def netslim(
    capfd: pytest.CaptureFixture[str], data_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Runs a command line in this process; gives the exit code and what went to stderr."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        code = guarded(lambda: dispatch([str(argument) for argument in arguments]))
        return code, capfd.readouterr().err

    return run


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
