"""What a command ignores, leaves out or replaces is said in one line, once."""

import errno
import fcntl
from pathlib import Path

import pytest
from test_launch_cli import Netslim

from netslim.launch.run.directory import occupied


def warnings_of(said: str) -> list[str]:
    """The warnings among the lines of stderr, without their heads."""
    return [line.partition("warning: ")[2] for line in said.splitlines() if "warning: " in line]


def test_a_file_system_without_locks_is_said_to_keep_no_run_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)  # as Lustre answers where it is mounted without
        with occupied(tmp_path):
            pass
    (line,) = warnings_of(capfd.readouterr().err)
    assert f"{tmp_path} has no locks" in line
    with occupied(tmp_path):
        pass
    assert capfd.readouterr().err == ""


def test_a_sweep_says_that_it_takes_no_wandb_run_id_here_and_as_jobs(
    netslim: Netslim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    code, said = netslim("sweep", "digits", "--run-dir", tmp_path / "sweep", "--slurm", "--dry-run")
    assert code == 0
    assert warnings_of(said) == ["ignores WANDB_RUN_ID: it names one run, and a sweep has many"]
