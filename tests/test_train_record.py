"""What a stage leaves behind: metrics.jsonl, and W&B without questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from netslim.train import Record, RecordConfig
from netslim.train.record import _wandb_mode

METRICS = {"epoch": 1, "train_loss": 0.5, "accuracy": 0.9, "images_per_second": 10.0}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_epoch_is_on_disk_as_soon_as_it_ended(tmp_path: Path) -> None:
    with Record("sparse", tmp_path, is_main=True) as record:
        record.epoch(METRICS, nn.Identity())
        assert lines(tmp_path / "metrics.jsonl") == [METRICS]
        record.epoch({**METRICS, "epoch": 2}, nn.Identity())
        assert [line["epoch"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_stage_that_starts_again_replaces_what_the_first_attempt_left(tmp_path: Path) -> None:
    for _ in range(2):
        with Record("sparse", tmp_path, is_main=True) as record:
            record.epoch(METRICS, nn.Identity())
    assert lines(tmp_path / "metrics.jsonl") == [METRICS]


def test_other_ranks_leave_and_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Record("sparse", tmp_path / "sparse", is_main=False) as record:
        record.epoch(METRICS, nn.Identity())
        record.say("hello")
    assert not (tmp_path / "sparse").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("wanted", "environment", "has_key", "mode"),
    [
        ("auto", None, True, "online"),
        ("auto", None, False, "offline"),
        ("auto", "offline", True, "offline"),
        ("auto", "disabled", True, None),
        ("online", "offline", False, "online"),
        ("offline", None, True, "offline"),
        ("disabled", None, True, None),
    ],
)
def test_the_wandb_mode_is_decided_without_a_prompt(
    wanted: Any, environment: str | None, has_key: bool, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert _wandb_mode(RecordConfig(wandb=wanted), has_key=lambda: has_key) == mode
