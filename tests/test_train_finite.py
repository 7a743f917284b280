"""A number that is not finite, on one rank, changes no weight on any rank, and is said where it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_train_distributed import Images, Shares, gammas_of, network, new_runtime
from torch import Tensor

from netslim.train import EngineConfig, FitConfig, Record, Runtime, fit

STEPS, BAD = 4, 2
CONFIG = FitConfig(epochs=1, lr=0.1, schedule="constant")


class Spoiled(Images):
    """Before one step, counted from 0, something on rank 1 becomes NaN or infinite."""

    def __init__(self, run: Runtime, what: str, gamma: Tensor) -> None:
        super().__init__(run, STEPS)
        self.what = what if run.rank == 1 else ""
        self.gamma = gamma

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (images, labels) in enumerate(super().epoch(epoch, first_batch)):
            if number == BAD and self.what == "gamma":
                self.gamma.data[0] = torch.nan
            if number == BAD and self.what == "gradient":
                self.gamma.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
            yield images * (torch.nan if number == BAD and self.what == "loss" else 1), labels


class First(Images):
    """The steps before the bad one."""

    def __init__(self, run: Runtime) -> None:
        super().__init__(run, STEPS)
        self.batches = self.batches[:BAD]


def train(directory: Path, what: str) -> tuple[str, dict[str, Tensor]]:
    """What the error said, and the weights that are left."""
    run = new_runtime(EngineConfig(batch_norm="frozen"))
    model, said = network(), ""
    images = Spoiled(run, what, gammas_of(model)[-1]) if what else First(run)
    with Record("sparse", directory, is_main=run.is_main) as record:
        try:
            fit(model, images, Shares(run, 10), CONFIG, run=run, record=record)
        except FloatingPointError as error:
            said = str(error)
    return said, {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_all(directory: Path) -> dict[str, tuple[str, dict[str, Tensor]]]:
    return {what: train(directory, what) for what in ("", "loss", "gradient", "gamma")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, dict[str, Tensor]]]]:
    directory = tmp_path_factory.mktemp("finite")
    return run_ranks(train_all, 2, directory, directory / "run")


@pytest.mark.parametrize(
    ("what", "said"), [("loss", "the loss of rank 1"), ("gamma", "the loss of rank 1"), ("gradient", "the gradient")]
)
def test_no_rank_applies_a_step_that_is_not_finite_on_one(what: str, said: str, found: list) -> None:
    for results in found:
        error, weights = results[what]
        assert f"sparse: {said} is not finite at step {BAD + 1} (epoch 1); no rank applied the step" in error
        for name, want in results[""][1].items():
            have = weights[name]
            if what == "gamma" and have.isnan().any():  # what was spoiled itself
                have, want = have[1:], want[1:]
            assert torch.equal(have, want), name
