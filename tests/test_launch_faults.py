"""A run that loses a process, or is told to stop, ends soon, says why, and goes on as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_end_to_end import SCRIPT, SHORT, alive_in_session, call

STAGES = ("sparse", "prune-0.50", "finetune-0.50", "prune-0.90", "finetune-0.90")


@pytest.fixture(scope="module")
def flags(data_cache: Path) -> list[object]:
    every = ["--checkpoint.steps", 5, "--record.wandb", "disabled", "--engine.timeout-seconds", 30]
    return [*SHORT, "--sparsify.epochs", 3, "--data.cache", data_cache, *every]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, flags: list[object]) -> tuple[Path, float]:
    """A run that nobody disturbs, and the seconds that it took."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    done = call(SCRIPT, "run", "digits", "--run-dir", directory, *flags)
    assert done.returncode == 0, done.stderr
    return directory, time.monotonic() - started


class Run:
    """A run in the background, of which single processes can be signalled."""

    def __init__(self, directory: Path, flags: list[object]) -> None:
        self.directory = directory
        arguments = [SCRIPT, "run", "digits", "--run-dir", directory, *flags]
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """False where the run ended first."""
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def ranks(self) -> list[psutil.Process]:
        """The worker processes, in order of their ranks; none before all have started."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                environment = child.environ()
                if "netslim.launch.recipe" in child.cmdline() and "LOCAL_RANK" in environment:
                    found[int(environment["LOCAL_RANK"])] = child
            except psutil.Error:
                continue
        return [found[rank] for rank in sorted(found)] if len(found) == 2 else []

    def finish(self) -> tuple[int, list[str], float]:
        """Exit code, netslim's lines on stderr, and the seconds that it took to end; no process may be left."""
        started = time.monotonic()
        _, error = self.process.communicate(timeout=120)
        seconds = time.monotonic() - started
        assert not alive_in_session(self.process.pid)
        return self.process.returncode, [line for line in error.splitlines() if line.startswith("netslim: ")], seconds


@pytest.fixture
def start(tmp_path: Path, flags: list[object]) -> Iterator[Callable[[], Run]]:
    runs: list[Run] = []

    def begin() -> Run:
        runs.append(Run(tmp_path / "run", flags))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)


def lines(directory: Path, stage: str) -> list[dict[str, Any]]:
    """The metrics of a stage, but for what a clock said."""
    found = [json.loads(line) for line in (directory / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in found]


def assert_as_undisturbed(directory: Path, undisturbed: Path) -> None:
    for stage in STAGES:
        have, want = ((path / stage / "weights.safetensors").read_bytes() for path in (directory, undisturbed))
        assert have == want, stage
        if not stage.startswith("prune"):
            assert lines(directory, stage) == lines(undisturbed, stage)


def is_training(run: Run, stage: str) -> Callable[[], bool]:
    return lambda: bool(list((run.directory / stage / "checkpoints").glob("step-*"))) and bool(run.ranks())


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_run_within_seconds_and_it_goes_on_from_the_checkpoint(
    rank: int, start: Callable[[], Run], undisturbed: tuple[Path, float]
) -> None:
    run = start()
    assert run.wait_until(is_training(run, "sparse"))
    run.ranks()[rank].kill()
    code, said, seconds = run.finish()
    assert code == 1
    assert f"netslim: sparse: SIGKILL ended rank {rank}; the same command goes on from the last checkpoint" in said
    assert seconds < 10  # two on an idle machine
    code, said, _ = start().finish()
    assert (code, said) == (0, [])
    assert_as_undisturbed(run.directory, undisturbed[0])


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_and_goes_on_from_it(
    number: signal.Signals, start: Callable[[], Run], undisturbed: tuple[Path, float]
) -> None:
    run = start()
    assert run.wait_until(is_training(run, "sparse"))
    run.ranks()[1].send_signal(number)
    code, said, _ = run.finish()
    assert code == 3
    (line,) = said
    assert "stopped by a signal after step" in line
    assert start().finish()[0] == 0
    assert_as_undisturbed(run.directory, undisturbed[0])


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_after_the_time_out_and_the_stage_is_named(start: Callable[[], Run]) -> None:
    run = start()
    assert run.wait_until(is_training(run, "sparse"))
    run.ranks()[1].suspend()
    code, said, seconds = run.finish()
    assert code == 1
    assert any("sparse: rank 0 lost contact with the others" in line for line in said), said
    assert seconds < 100


@pytest.mark.slow
def test_a_killed_rank_is_replaced_where_restarts_are_allowed(
    tmp_path: Path, flags: list[object], undisturbed: tuple[Path, float]
) -> None:
    run = Run(tmp_path / "run", [*flags, "--max-restarts", 1])
    assert run.wait_until(is_training(run, "sparse"))
    run.ranks()[1].kill()
    code, _, _ = run.finish()
    assert code == 0
    assert_as_undisturbed(run.directory, undisturbed[0])


@pytest.mark.soak
@pytest.mark.timeout(14400)
def test_100_random_kills_change_nothing(tmp_path: Path, flags: list[object], undisturbed: tuple[Path, float]) -> None:
    directory, seconds = undisturbed
    draw = random.Random(0)
    for attempt in range(100):
        run = Run(tmp_path / str(attempt), flags)
        moment = time.monotonic() + draw.uniform(0, seconds)
        while time.monotonic() < moment and run.process.poll() is None:
            time.sleep(0.01)
        if run.process.poll() is None:
            processes = run.ranks()
            if processes:
                draw.choice(processes).kill()
            else:  # before the ranks started: the launcher itself
                os.killpg(run.process.pid, signal.SIGKILL)
            run.finish()
        again = Run(tmp_path / str(attempt), flags)
        code, said, _ = again.finish()
        assert (code, said) == (0, []), (attempt, said)
        assert_as_undisturbed(again.directory, directory)
