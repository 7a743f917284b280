"""A run that loses a process, or is told to stop, ends soon, says why, and goes on as if nothing had been."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from faulty import MOMENT, Fault
from test_train_resume import lines
from whole_run import ONE_RATIO, SCRIPT, SHORT, alive, results, stages

TIMEOUT = 10
SOON = 10
"""Seconds in which all end with a lost rank; two on an idle machine."""
BUSY = 25
"""Seconds more in `make test`, beside whatever else the machine does; `make slow` and `make soak` give none. There a
rank also counts as lost only so much later: one that waits for a busy machine is not."""
# without a loader that compiles, for which ranks may take unequally long
FAULT_FLAGS = (
    "--prune.ratio",
    0.5,
    "--data.loader",
    "torch",
    "--data.num-workers",
    0,
)


@pytest.fixture(scope="module")
def flags(data_cache: Path) -> list[object]:
    return [*SHORT, *ONE_RATIO, "--data.cache", data_cache, "--record.wandb", "disabled"]


class Run:
    """A run in the background, of which single processes can be signalled."""

    def __init__(self, directory: Path, flags: list[object], environment: Mapping[str, str] = {}) -> None:
        self.directory = directory
        arguments = [SCRIPT, "run", "digits", "--run-dir", directory, *flags]
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            cwd=Path(__file__).parent,  # where `faulty` is
            start_new_session=True,
        )

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """False where the run ended first."""
        deadline = time.monotonic() + 600
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
        _, error = self.process.communicate(timeout=600)
        seconds = time.monotonic() - started
        assert not alive(self.directory)
        return self.process.returncode, [line for line in error.splitlines() if line.startswith("netslim: ")], seconds


@pytest.fixture
def start(tmp_path: Path, flags: list[object]) -> Iterator[Callable[[], Run]]:
    runs: list[Run] = []

    def begin(*more: object) -> Run:
        runs.append(Run(tmp_path / "run", [*flags, *more]))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)


def last_checkpoint(stage: Path) -> bytes:
    """Weights, momenta, and what each rank has of its own."""
    newest = max((stage / "checkpoints").glob("step-*"))
    return (newest / "tensors.safetensors").read_bytes()


def assert_equal_runs(have: Path, want: Path) -> None:
    """Bit for bit, at the ratios of the first run: the other one may have more."""
    tables = [[{**row, "seconds": 0} for row in results(path)["rows"]] for path in (have, want)]
    ratios = sorted({row["ratio"] for row in tables[0]} - {0.0})
    assert ratios
    assert tables[0] == [row for row in tables[1] if row["ratio"] in (0.0, *ratios)]
    for stage in stages(*ratios):
        weights = [(path / stage / "weights.safetensors").read_bytes() for path in (have, want)]
        assert weights[0] == weights[1], stage
        if stage.startswith(("sparse", "finetune")):
            assert lines(have / stage) == lines(want / stage)
            assert last_checkpoint(have / stage) == last_checkpoint(want / stage), stage


def checkpoints(run: Run) -> list[str]:
    """Those of sparsity training, the oldest first."""
    return sorted(path.name for path in (run.directory / "sparse" / "checkpoints").glob("step-*"))


def is_training(run: Run) -> Callable[[], bool]:
    """In sparsity training, and past the checkpoints that were there before."""
    before = checkpoints(run)
    return lambda: checkpoints(run)[-1:] > before[-1:] and bool(run.ranks())


def lose(run: Run, rank: int, spare: float = 0) -> None:
    """Kill a rank: the others end with it, long before the time-out of ten minutes, and say whom they miss."""
    assert run.wait_until(is_training(run))
    run.ranks()[rank].kill()
    code, said, seconds = run.finish()
    assert code == 1
    # by the launcher, or by the other rank where that is quicker
    assert any(line.startswith("netslim: sparse") and f"rank {rank}" in line for line in said), said
    assert seconds < SOON + spare


def stop(run: Run, number: signal.Signals, whom: str) -> None:
    """Tell a run to stop: it saves first."""
    assert run.wait_until(is_training(run))
    (run.ranks()[1] if whom == "rank 1" else psutil.Process(run.process.pid)).send_signal(number)
    code, said, _ = run.finish()
    assert code == 3
    (line,) = said
    assert "stopped by a signal after step" in line


def finish(run: Run, whole_run: Path) -> None:
    """Let it end, as if nothing had been."""
    code, said, _ = run.finish()
    assert (code, said) == (0, [])
    assert_equal_runs(run.directory, whole_run)


def test_a_run_that_lost_a_rank_and_then_was_told_to_stop_goes_on_from_its_checkpoint_each_time(
    start: Callable[..., Run], whole_run: Path
) -> None:
    lose(start(), rank=1, spare=BUSY)
    stop(start("--max-restarts", 1), signal.SIGUSR1, "rank 1")
    finish(start(), whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_within_seconds_and_it_goes_on_from_the_checkpoint(
    rank: int, start: Callable[[], Run], whole_run: Path
) -> None:
    lose(start(), rank)
    finish(start(), whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom", "restarts"),
    [
        (signal.SIGUSR1, "rank 1", 1),
        (signal.SIGTERM, "rank 1", 0),
        (signal.SIGTERM, "the launcher", 0),
        (signal.SIGUSR1, "the launcher", 1),
    ],
)
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_and_goes_on_from_it(
    number: signal.Signals, whom: str, restarts: int, start: Callable[..., Run], whole_run: Path
) -> None:
    stop(start("--max-restarts", restarts), number, whom)
    finish(start(), whole_run)


LAST = {"training": 60, "evaluation": 3, "pruning": 2}
"""The last call of the network, at each place, that every rank comes to."""
SAID = {"training": "netslim: sparse, epoch ", "evaluation": ", evaluation: ", "pruning": "netslim: prune-0.50"}


def assert_ends_in_time(fault: Fault, flags: list[object], spare: float = 0) -> float:
    """Run into the fault; gives the seconds from it to the end of the last process."""
    own = ["--model", "faulty:build", "--model.width", 1]
    patience = int(TIMEOUT + spare)
    timeout = ["--engine.timeout-seconds", patience]
    run = Run(Path(fault.run_dir), [*flags, *own, *FAULT_FLAGS, *timeout], fault.environment())
    code, said, _ = run.finish()
    ended = time.time()
    assert code == 1, (fault, said)
    seconds = ended - float((run.directory / MOMENT).read_text())
    told = [line for line in said if SAID[fault.place] in line and f"rank {fault.rank} " in line]
    assert told, (fault, said)
    if fault.signal == signal.SIGSTOP:
        assert any("does not run any more" in line for line in told), told
    assert seconds < (5 if fault.signal == signal.SIGKILL else patience + 2) + spare, fault
    return seconds


@pytest.mark.parametrize(
    ("place", "number", "rank", "count", "spare"),
    [
        ("evaluation", signal.SIGSTOP, 1, 2, BUSY),
        pytest.param("training", signal.SIGSTOP, 0, 30, 0, marks=pytest.mark.slow),
        pytest.param("pruning", signal.SIGKILL, 0, 1, 0, marks=pytest.mark.slow),
        pytest.param("pruning", signal.SIGSTOP, 1, 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_rank_dies_or_stops_ends_in_time_and_names_rank_and_stage(
    place: str, number: signal.Signals, rank: int, count: int, spare: float, tmp_path: Path, flags: list[object]
) -> None:
    assert_ends_in_time(Fault(str(tmp_path / "run"), rank, place, number, count), flags, spare)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_50_random_faults_end_their_runs_in_time(tmp_path: Path, flags: list[object]) -> None:
    draw = random.Random(0)
    for attempt in range(50):
        place = (*LAST,)[attempt % 3]
        number = (signal.SIGKILL, signal.SIGSTOP)[attempt % 2]
        fault = Fault(str(tmp_path / str(attempt)), draw.randrange(2), place, number, draw.randint(1, LAST[place]))
        seconds = assert_ends_in_time(fault, flags)
        print(f"{attempt}: {number.name} of rank {fault.rank} in {place} {fault.count}: {seconds:.2f} s", flush=True)


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(start: Callable[[], Run], whole_run: Path) -> None:
    run = start()
    assert run.wait_until(is_training(run))
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert (run.directory / "preempted").exists()
    finish(start(), whole_run)


def test_processes_whose_launcher_is_killed_before_they_have_joined_end_too(start: Callable[[], Run]) -> None:
    run = start()
    assert run.wait_until(lambda: bool(run.ranks()))
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert not (run.directory / "sparse").exists()


@pytest.mark.slow
def test_a_killed_rank_is_replaced_where_restarts_are_allowed(
    tmp_path: Path, flags: list[object], whole_run: Path
) -> None:
    run = Run(tmp_path / "run", [*flags, "--max-restarts", 1])
    assert run.wait_until(is_training(run))
    run.ranks()[1].kill()
    code, said, _ = run.finish()
    assert code == 0
    assert said[-1] == "netslim: all processes are started again, and go on from the last checkpoint"
    assert_equal_runs(run.directory, whole_run)


@pytest.mark.slow
def test_what_would_fail_again_is_not_started_again(start: Callable[..., Run]) -> None:
    code, said, _ = start("--max-restarts", 1, "--sparsify.lr", 1e20).finish()
    assert code == 2
    (line,) = said
    assert "not finite" in line
