"""How far a stage is, in a batch log and on a terminal; what an epoch waited for."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_train_distributed import Images, Shares, network, new_runtime
from torch import Tensor

from netslim.train import EngineConfig, FitConfig, Record, fit, meters
from netslim.train.meters import Waits, peak_memory
from netslim.train.record.pace import Leg, Pace, in_words


class Clock:
    """Moves only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def follow(pace: Pace, clock: Clock, leg: Leg, *, seconds: float) -> None:
    """The loop over a leg, each item of which takes so long."""
    for _ in pace.follow(range(leg.first, leg.total), leg):
        clock.now += seconds


def new_pace(clock: Clock, said: list[str], seconds: float = 60.0, is_main: bool = True) -> Pace:
    return Pace("sparse", said.append, is_main=is_main, seconds=seconds, clock=clock)


def epoch(number: int, first: int = 0, parts: int = 1) -> Leg:
    """One of three epochs of 100 batches, of 512 images each."""
    what = f"epoch {number}/3"
    return Leg(what=what, total=100, first=first, before=100 * (number - 1), way=300, parts=parts, images=lambda _: 512)


def test_a_line_a_minute_says_what_is_left_of_the_whole_stage() -> None:
    said: list[str] = []
    clock = Clock()
    follow(new_pace(clock, said), clock, epoch(1), seconds=1.0)
    assert said == ["epoch 1/3  step 60/100  512 images/s  4 min left"]


def test_the_time_left_counts_what_happens_between_epochs() -> None:
    said: list[str] = []
    clock = Clock()
    pace = new_pace(clock, said)
    for number in (1, 2):
        follow(pace, clock, epoch(number), seconds=0.4)
        clock.now += 20  # an evaluation
    # 101 batches took 60.4 seconds, and 199 are left
    assert said == ["epoch 2/3  step 1/100  1,280 images/s  2 min left"]


def test_a_stage_that_goes_on_counts_only_what_this_process_did() -> None:
    said: list[str] = []
    clock = Clock()
    follow(new_pace(clock, said), clock, epoch(3, first=30), seconds=1.0)
    assert said == ["epoch 3/3  step 90/100  512 images/s  10 s left"]


def test_steps_are_those_of_the_optimizer() -> None:
    said: list[str] = []
    clock = Clock()
    follow(new_pace(clock, said), clock, epoch(1, parts=4), seconds=1.0)
    assert [line.split("  ")[1] for line in said] == ["step 15/25"]


def test_a_loop_without_images_names_none_and_is_the_whole_way() -> None:
    said: list[str] = []
    clock = Clock()
    follow(new_pace(clock, said, seconds=5.0), clock, Leg(what="reconstructing", total=4), seconds=3.0)
    assert said == ["reconstructing  step 2/4  6 s left"]


def test_what_ends_sooner_and_other_ranks_say_nothing() -> None:
    said: list[str] = []
    clock = Clock()
    follow(new_pace(clock, said), clock, epoch(1), seconds=0.1)
    follow(new_pace(clock, said, is_main=False), clock, epoch(1), seconds=10.0)
    assert said == []


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said: list[str] = []
    clock = Clock()
    follow(new_pace(clock, said), clock, epoch(3, first=98), seconds=100.0)
    assert said == []
    assert "sparse epoch 3/3:  98%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (3570, "1 h 0 min"), (7800, "2 h 10 min")]
)
def test_a_time_to_come_is_said_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_waiting_is_what_passes_before_an_item_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=clock))

    def slowly() -> Iterator[int]:
        for number in range(3):
            clock.now += 0.5
            yield number

    waits = Waits(slowly())
    for _ in waits:
        clock.now += 10
    assert waits.seconds == 1.5
    assert waits.share(2 * waits.seconds) == 0.5
    assert waits.share(0.0) == 0.0


NAP = 0.2


class Slow(Images):
    """Images of which each batch takes a while."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().epoch(epoch, first_batch):
            time.sleep(NAP)
            yield batch


def test_an_epoch_says_how_long_it_waited_for_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    run = new_runtime(EngineConfig())
    found: list[dict[str, Any]] = []
    for images in (Slow(run, 4), Images(run, 4)):
        with Record("sparse", tmp_path, is_main=True) as record:
            fit(network(), images, Shares(run, 10), FitConfig(epochs=2), run=run, record=record)
        found.append(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]))
    run.close()
    slow, fast = found
    assert 4 * NAP <= slow["data_wait"] * slow["seconds"] <= slow["seconds"]
    assert 0 <= fast["data_wait"] < slow["data_wait"]
    assert "gpu_memory_mb" not in slow
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].startswith("sparse: epoch 2/2  loss ")
    assert lines[1].endswith(f"images/s  data wait {100 * slow['data_wait']:.0f} %")


def test_the_peak_of_memory_is_that_of_a_gpu() -> None:
    assert peak_memory(torch.device("cpu")) == {}
