"""A run that is killed at any moment, and started again, ends as the undisturbed one, bit for bit."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import TEMPLATE
from test_end_to_end import SHORT
from test_launch_faults import assert_equal_runs

from netslim.launch.mistakes import LOST_RANK, guarded


@dataclass(frozen=True)
class Outcome:
    codes: tuple[int | None, ...]
    seconds: float
    place: str
    """Where the killed rank was missed; empty where none was."""


def run(directory: Path, flags: list[object], kill: tuple[int, float] | None = None) -> Outcome:
    """Run `digits` in two processes; of one, `kill` says which and after how many seconds."""
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
        rank, moment = kill
        ranks[rank].join(max(0.0, started + moment - time.monotonic()))
        ranks[rank].kill()
        ranks[1 - rank].join(5)
        ranks[1 - rank].terminate()  # as launchers do: before it has joined the other it waits for it
    for process in ranks:
        process.join(240)
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
    every = ["--checkpoint.steps", 5, "--record.wandb", "disabled", "--engine.timeout-seconds", 30]
    return [*SHORT, "--sparsify.epochs", 3, "--data.cache", data_cache, "--data.num-workers", 0, *every]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, flags: list[object]) -> dict[str, tuple[Path, float]]:
    """For each loader a run that nobody disturbs, and its seconds."""
    first = TEMPLATE.Process(target=int)  # or the first run's seconds would be the template's too
    first.start()
    first.join()
    found = {}
    for loader in ("torch", "ffcv"):
        directory = tmp_path_factory.mktemp(loader)
        outcome = run(directory, [*flags, "--data.loader", loader])
        assert outcome.codes == (0, 0), (directory / "log").read_text()
        found[loader] = (directory / "run", outcome.seconds)
    return found


def kill_and_finish(
    directory: Path, flags: list[object], loader: str, rank: int, share: float, undisturbed: dict[str, Any]
) -> Outcome:
    """Kill a rank after a share of the run's time, let it finish, and compare."""
    want, seconds = undisturbed[loader]
    flags = [*flags, "--data.loader", loader]
    killed = run(directory, flags, kill=(rank, share * seconds))
    assert killed.codes[1 - rank] in (0, LOST_RANK, -signal.SIGTERM), (directory / "log").read_text()
    finished = run(directory, flags)
    assert finished.codes == (0, 0), (directory / "log").read_text()
    assert_equal_runs(directory / "run", want)
    return killed


@pytest.mark.timeout(900)  # for a busy machine: two whole runs, and two more for the first one's fixture
@pytest.mark.parametrize(("rank", "share"), [(0, 0.4), (1, 0.6), pytest.param(0, 0.8, marks=pytest.mark.slow)])
def test_a_kill_changes_nothing(
    rank: int, share: float, tmp_path: Path, flags: list[object], undisturbed: dict[str, Any]
) -> None:
    kill_and_finish(tmp_path, flags, "torch", rank, share, undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(14400)
def test_100_random_kills_change_nothing(tmp_path: Path, flags: list[object], undisturbed: dict[str, Any]) -> None:
    draw, places = random.Random(0), Counter[str]()
    attempt = -1
    while places.total() < 100:
        attempt += 1
        loader = "ffcv" if attempt % 5 == 0 else "torch"
        rank, share = draw.randrange(2), draw.random()
        killed = kill_and_finish(tmp_path / str(attempt), flags, loader, rank, share, undisturbed)
        if killed.codes[rank] == -signal.SIGKILL:  # else the run was over before
            places[killed.place or "before the ranks had joined"] += 1
        print(f"{attempt}: rank {rank} at {share:.2f} ({loader}) {killed}", flush=True)
        subprocess.run(["rm", "-r", tmp_path / str(attempt)], check=True)
    print(places)
