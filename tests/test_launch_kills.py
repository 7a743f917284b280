"""A run that is killed at any moment, and started again, ends as the undisturbed one, bit for bit."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import TEMPLATE
from test_launch_faults import assert_equal_runs
from whole_run import ONE_RATIO, SHORT

from netslim.launch.mistakes import LOST_RANK, guarded


@dataclass(frozen=True)
class Outcome:
    codes: tuple[int | None, ...]
    seconds: float
    place: str
    """Where the killed rank was missed; empty where none was."""


Moment = Callable[[float], bool]
"""Whether it has come, so many seconds after the start."""


def run(directory: Path, flags: list[object], kill: tuple[int, Moment] | None = None) -> Outcome:
    """Run `digits` in two processes; `kill` says which of them ends when."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory.mkdir(exist_ok=True)
    arguments = ["digits", "--run-dir", str(directory / "run"), *map(str, flags)]
    log = directory / "log"
    log.write_text("")
    ranks = [TEMPLATE.Process(target=be_rank, args=(rank, port, arguments, str(log))) for rank in range(2)]
    started = time.monotonic()
    for process in ranks:
        process.start()
    if kill is not None:
        rank, has_come = kill
        while ranks[rank].is_alive() and not has_come(time.monotonic() - started):
            time.sleep(0.01)
        ranks[rank].kill()
        ranks[1 - rank].join(15)
        ranks[1 - rank].terminate()  # as launchers do: before it has joined the other it waits for it
    for process in ranks:
        process.join(600)
    assert not any(process.is_alive() for process in ranks)
    seconds = time.monotonic() - started
    said = [line for line in log.read_text().splitlines() if line.startswith("netslim: ")]
    return Outcome(tuple(p.exitcode for p in ranks), seconds, said[0].split(": ")[1] if said else "")


def be_rank(rank: int, port: int, arguments: list[str], log: str) -> None:
    """What a launcher starts."""
    from netslim.launch.recipe import main

    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late for a copy
    sys.argv = ["recipe", *arguments]
    sys.exit(guarded(main))


@pytest.fixture(scope="module")
def flags(data_cache: Path) -> list[object]:
    return [*SHORT, *ONE_RATIO, "--data.cache", data_cache, "--data.num-workers", 0, "--record.wandb", "disabled"]


def kill_and_finish(
    directory: Path, flags: list[object], loader: str, rank: int, has_come: Moment, whole_run: Path
) -> Outcome:
    """Kill a rank when the moment has come, let the run finish, and compare: whatever the loader, the images are."""
    flags = [*flags, "--data.loader", loader]
    killed = run(directory, flags, kill=(rank, has_come))
    assert killed.codes[1 - rank] in (0, LOST_RANK, -signal.SIGTERM), (directory / "log").read_text()
    finished = run(directory, flags)
    assert finished.codes == (0, 0), (directory / "log").read_text()
    assert_equal_runs(directory / "run", whole_run)
    return killed


@pytest.mark.parametrize(
    ("rank", "after"),
    [
        (0, "prune-0.50/metrics.json"),
        pytest.param(1, "finetune-0.50/checkpoints/step-00000005/manifest.json", marks=pytest.mark.slow),
        pytest.param(0, "sparse/checkpoints/step-00000010/manifest.json", marks=pytest.mark.slow),
        pytest.param(1, "repair-0.50/metrics.json", marks=pytest.mark.slow),
    ],
)
def test_a_kill_changes_nothing(rank: int, after: str, tmp_path: Path, flags: list[object], whole_run: Path) -> None:
    there = tmp_path / "run" / after
    killed = kill_and_finish(tmp_path, flags, "torch", rank, lambda _: there.exists(), whole_run)
    assert killed.codes[rank] == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, flags: list[object]) -> dict[str, float]:
    """With each loader the seconds of a run that nobody disturbs."""
    first = TEMPLATE.Process(target=int)  # or the first run's seconds would be the template's too
    first.start()
    first.join()
    found = {}
    for loader in ("torch", "ffcv"):
        directory = tmp_path_factory.mktemp(loader)
        outcome = run(directory, [*flags, "--data.loader", loader])
        assert outcome.codes == (0, 0), (directory / "log").read_text()
        found[loader] = outcome.seconds
    return found


@pytest.mark.soak
@pytest.mark.timeout(14400)
def test_100_random_kills_change_nothing(
    tmp_path: Path, flags: list[object], undisturbed: dict[str, float], whole_run: Path
) -> None:
    draw, places = random.Random(0), Counter[str]()
    attempt = -1
    while places.total() < 100:
        attempt += 1
        loader = "ffcv" if attempt % 5 == 0 else "torch"
        rank, share = draw.randrange(2), draw.random()
        end = share * undisturbed[loader]
        killed = kill_and_finish(
            tmp_path / str(attempt), flags, loader, rank, lambda seconds, end=end: seconds > end, whole_run
        )
        if killed.codes[rank] == -signal.SIGKILL:  # else the run was over before
            places[killed.place or "before the ranks had joined"] += 1
        print(f"{attempt}: rank {rank} at {share:.2f} ({loader}) {killed}", flush=True)
        subprocess.run(["rm", "-r", tmp_path / str(attempt)], check=True)
    print(places)
