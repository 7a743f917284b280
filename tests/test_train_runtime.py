"""What ranks do together, on two real ones."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from netslim.train import EngineConfig, LostRankError, Runtime, few_images


def fail(message: str) -> None:
    raise ValueError(message)


def caught(call: Callable[[], Any]) -> tuple[str, bool]:
    """The message of the ValueError that the call raises, and whether another rank reports it."""
    try:
        call()
    except ValueError as error:
        return str(error), error.is_echo  # type: ignore[attr-defined]
    raise AssertionError("nothing was raised")


def together() -> dict[str, Any]:
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"  # as a launcher says
    run = Runtime(EngineConfig(), seed=0)
    seen: dict[str, Any] = {"rank": run.rank, "world_size": run.world_size, "engine": run.engine}
    with run.accumulate(nn.Identity()) as seen["steps with each micro-batch"]:
        pass
    seen["on_main"] = run.on_main(lambda: {"rank": run.rank})
    seen["on_main failed"] = caught(lambda: run.on_main(lambda: fail("no room")))
    seen["on_all"] = run.on_all(lambda: run.rank)
    seen["on_all failed on rank 1"] = caught(lambda: run.on_all(lambda: fail("torn") if run.rank == 1 else None))
    seen["sum"] = run.sum_over_ranks(torch.tensor([run.rank + 1.0]))

    norm = nn.BatchNorm1d(1, momentum=1.0)
    images = torch.tensor([[1.0], [2.0], [3.0]]) if run.rank == 0 else torch.tensor([[6.0], [8.0], [10.0]])
    norm(images)
    seen["unequal"] = _unequal(run, norm)
    run.reconcile_statistics(norm)
    seen["mean"], seen["variance"] = norm.running_mean, norm.running_var
    seen["digest"] = run.check_equal(norm, "after reconciling")
    run.close()
    return seen


def _unequal(run: Runtime, module: nn.Module) -> str:
    try:
        run.check_equal(module, "before reconciling")
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(together, 2, tmp_path_factory.mktemp("ranks"))


def test_two_cpu_processes_form_one_ddp_group(ranks: list[dict[str, Any]]) -> None:
    assert [(seen["rank"], seen["world_size"], seen["engine"]) for seen in ranks] == [(0, 2, "ddp"), (1, 2, "ddp")]


def test_parts_of_a_batch_are_the_configurations_and_not_the_launchers(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["steps with each micro-batch"] for seen in ranks)


def test_every_rank_gets_what_rank_0_found(ranks: list[dict[str, Any]]) -> None:
    assert [seen["on_main"] for seen in ranks] == [{"rank": 0}] * 2


def test_what_rank_0_raises_is_raised_on_every_rank_and_reported_by_rank_0(ranks: list[dict[str, Any]]) -> None:
    assert [seen["on_main failed"] for seen in ranks] == [("no room", False), ("no room", True)]


def test_what_one_rank_raises_is_raised_on_every_rank_and_reported_by_that_one(ranks: list[dict[str, Any]]) -> None:
    assert [seen["on_all failed on rank 1"] for seen in ranks] == [("torn", True), ("torn", False)]
    assert [seen["on_all"] for seen in ranks] == [0, 1]


def test_sums_are_over_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [seen["sum"].tolist() for seen in ranks] == [[3.0], [3.0]]


def test_statistics_become_those_of_all_ranks_together(ranks: list[dict[str, Any]]) -> None:
    # means 2 and 8; sample variances 1 and 4: mean of means 5, mean of variances 2.5 plus variance of means 9
    for seen in ranks:
        torch.testing.assert_close(seen["mean"], torch.tensor([5.0]))
        torch.testing.assert_close(seen["variance"], torch.tensor([11.5]))


def test_unequal_weights_are_noticed_and_equal_ones_have_one_digest(ranks: list[dict[str, Any]]) -> None:
    assert all("rank 1 differ from those of rank 0" in seen["unequal"] for seen in ranks)
    assert ranks[0]["digest"] == ranks[1]["digest"]


def hang() -> str:
    """Rank 1 never comes to the sum, though it runs."""
    run = Runtime(EngineConfig(timeout_seconds=10), seed=0)
    if run.rank == 1:
        time.sleep(100)
    with pytest.raises(LostRankError) as caught, run.watching(), run.at("a test"):
        run.sum_over_ranks(torch.ones(1))
    return str(caught.value)


def test_a_rank_that_runs_but_does_not_come_is_named_and_ended(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="0, -9"):
        run_ranks(hang, 2, tmp_path)
    said = torch.load(tmp_path / "result-0.pt")
    assert said == "the start, a test: rank 1 did not answer within 6 s (last seen in the start)"


def test_fewer_than_16_images_for_each_batchnorm_are_said_with_what_helps() -> None:
    line = few_images(64, 8, EngineConfig())
    assert line is not None
    assert line.startswith("each BatchNorm normalises by 8 images (batch 64 over 8 processes)")
    for remedy in ("--num-processes 4", "--engine.batch-norm sync", "--data.batch-size 128"):
        assert remedy in line
    assert few_images(64, 4, EngineConfig()) is None
    assert few_images(16, 8, EngineConfig(batch_norm="sync")) is None
    assert few_images(2, 1, EngineConfig(batch_norm="frozen")) is None


def test_what_cannot_help_is_not_recommended_where_batchnorms_see_few_images() -> None:
    line = few_images(8, 1, EngineConfig())
    assert line is not None
    assert "use a larger batch (--data.batch-size 16)" in line
    assert "processes" not in line
    line = few_images(64, 2, EngineConfig(accumulation=4))
    assert line is not None
    assert "normalises by 8 images (batch 64 over 2 processes in 4 accumulation steps)" in line
    assert "--num-processes 1" in line
    assert "--engine.accumulation" in line
    assert "--data.batch-size 128" in line
    line = few_images(6, 3, EngineConfig())
    assert line is not None
    assert "--num-processes" not in line  # even one process would have too few
    assert "--data.batch-size 48" in line
