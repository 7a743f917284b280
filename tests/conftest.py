"""Fixtures that several test files share."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from whole_run import SCRIPT, SHORT, call

from netslim.launch.cli import dispatch
from netslim.launch.mistakes import guarded

# Threads that share cores with other work wait for each other: here and in every process that is started, one each.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for prepared data that lives as long as the test session: the digits are written once."""
    return tmp_path_factory.mktemp("data_cache")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """`netslim run digits`, shortened, in two processes, with W&B's record offline: undisturbed, and not to be changed.

    Whatever is killed, stopped or started in another way has to end as it did.
    """
    directory = tmp_path_factory.mktemp("whole") / "run"
    flags = ["--run-dir", directory, *SHORT, "--data.cache", data_cache]
    done = call(SCRIPT, "run", "digits", *flags, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    return directory


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


class Disk:
    """A small file system of its own, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        """Mount it, or once it is mounted change its size or what may be done with it."""
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            pytest.skip("this machine lets nobody mount a file system")

    def resize(self, num_bytes: int) -> None:
        self.mount(f"remount,size={num_bytes}")

    def fill(self) -> Path:
        """Leave not a byte of room; returns the file that takes it."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        return ballast


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of 64 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    found = Disk(tmp_path / "disk")
    found.path.mkdir()
    found.mount("size=64m")
    yield found
    subprocess.run(["umount", "--lazy", found.path], check=True)


@pytest.fixture
def full_disk(disk: Disk) -> Path:
    """A file system of 64 KiB, too small for any weights."""
    disk.resize(64 << 10)
    return disk.path
