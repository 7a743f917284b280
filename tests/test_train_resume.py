"""Training that is taken up again ends as the undisturbed one, bit for bit."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_train_distributed import Images, Shares, gammas_of, network, new_runtime
from torch import Tensor, nn

from netslim.train import CheckpointConfig, EngineConfig, FitConfig, Record, Saver, SparsityConfig, Store, fit

STEPS, EPOCHS = 4, 2
CONFIG = FitConfig(epochs=EPOCHS, lr=0.1, schedule="onecycle", clip=1.0)
ENGINE = EngineConfig()
EVERY_STEP = CheckpointConfig(steps=1, keep=100)


class CrashError(Exception):
    """What a lost process is to those tests that stay in one."""


class Dying(Images):
    """Images that are out after some batches: the process that reads them ends there."""

    def __init__(self, *arguments: Any, batches: int) -> None:
        super().__init__(*arguments)
        self.left = batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().epoch(epoch, first_batch):
            if not self.left:
                raise CrashError
            self.left -= 1
            yield batch


class Dropping(nn.Module):
    """The small network with dropout, whose draws have to go on where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.drop(x))


def train(
    directory: Path,
    *,
    die_after: int | None = None,
    engine: EngineConfig = ENGINE,
    checkpoint: CheckpointConfig = EVERY_STEP,
    dropout: bool = True,
) -> dict[str, Tensor]:
    run = new_runtime(engine)
    torch.manual_seed(run.rank)
    model = Dropping() if dropout else network()
    images = Images(run, STEPS) if die_after is None else Dying(run, STEPS, batches=die_after)
    store = Store(directory / "checkpoints", checkpoint.keep)
    with Record("sparse", directory, is_main=run.is_main) as record:
        fit(
            model,
            images,
            Shares(run, 10),
            CONFIG,
            run=run,
            record=record,
            gammas=gammas_of(model),
            sparsity=SparsityConfig(weight=1e-3),
            saver=Saver(store, run, checkpoint, {"stage": "sparse"}),
        )
    return model.state_dict()


def momenta(directory: Path) -> dict[str, Tensor]:
    found = Store(directory / "checkpoints").newest(print)
    assert found is not None
    return dict(found.tensors)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def lines(directory: Path) -> list[dict[str, Any]]:
    """The metrics but for what depends on the machine and its moods."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    moods = ("seconds", "images_per_second", "checkpoint_seconds", "data_wait", "gpu_memory_mb")
    return [{k: v for k, v in line.items() if k not in moods} for line in found]


def train_and_crash(
    directory: Path, engine: EngineConfig, crashes: Sequence[int]
) -> dict[int, dict[str, dict[str, Tensor]]]:
    """The weights and the last checkpoint of a run undisturbed (-1), and of runs that crashed after so many batches."""
    found = {}
    for crash in (-1, *crashes):
        place = directory / str(crash)
        if crash >= 0:
            with pytest.raises(CrashError):
                train(place, die_after=crash, engine=engine)
        weights = train(place, engine=engine)
        found[crash] = {"weights": weights, "checkpoint": momenta(place)}
    return found


def crash_and_compare(world_size: int, tmp_path: Path, engine: EngineConfig, crashes: Sequence[int]) -> None:
    directory = tmp_path / "runs"
    for results in run_ranks(train_and_crash, world_size, tmp_path, directory, engine, crashes):
        assert len(results) == 1 + len(crashes)
        for crash, result in results.items():
            assert_equal(result["weights"], results[-1]["weights"])
            assert_equal(result["checkpoint"], results[-1]["checkpoint"])
            assert lines(directory / str(crash)) == lines(directory / "-1")


@pytest.mark.parametrize(
    "engine",
    [ENGINE, pytest.param(EngineConfig(accumulation=2), marks=pytest.mark.slow)],
    ids=["plain", "accumulation"],
)
def test_a_crash_after_any_batch_changes_nothing_on_two_ranks(engine: EngineConfig, tmp_path: Path) -> None:
    crash_and_compare(2, tmp_path, engine, range(1, STEPS * EPOCHS * engine.accumulation))


@pytest.mark.parametrize(
    ("zero", "crashes"),
    [
        (3, (1, STEPS, STEPS + 1)),
        *(pytest.param(zero, range(1, STEPS * EPOCHS), marks=pytest.mark.slow) for zero in (2, 3)),
    ],
    ids=["3", "2-any", "3-any"],
)
def test_a_crash_under_zero_changes_nothing(zero: int, crashes: Sequence[int], tmp_path: Path) -> None:
    crash_and_compare(1, tmp_path, EngineConfig(zero=zero), crashes)  # type: ignore[arg-type]


def crash(directory: Path, after: int) -> None:
    with pytest.raises(CrashError):
        train(directory, die_after=after, engine=EngineConfig(batch_norm="frozen"), dropout=False)


def finish(directory: Path) -> tuple[dict[str, Tensor], str]:
    """The weights, and what is said."""
    with redirect_stdout(io.StringIO()) as said:
        return train(directory, engine=EngineConfig(batch_norm="frozen"), dropout=False), said.getvalue()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_at_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    for name in ("crash", "finish", "alone"):
        (tmp_path / name).mkdir()
    run_ranks(crash, before, tmp_path / "crash", tmp_path / "run", 5)
    ((have, said), *_) = run_ranks(finish, after, tmp_path / "finish", tmp_path / "run")
    ((want, _),) = run_ranks(finish, 1, tmp_path / "alone", tmp_path / "undisturbed")
    assert f"after step 5, of {before} processes, as {after}: BatchNorm statistics are combined" in said
    for name in want:
        torch.testing.assert_close(have[name], want[name], rtol=1e-5, atol=1e-7)
    assert [line["step"] for line in lines(tmp_path / "run")] == [4, 8]
    for have_line, want_line in zip(lines(tmp_path / "run"), lines(tmp_path / "undisturbed"), strict=True):
        assert have_line["train_accuracy"] == want_line["train_accuracy"]
