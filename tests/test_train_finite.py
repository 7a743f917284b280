"""A number that is not finite, on one rank, changes no weight on any rank, and is said where it was."""

import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from ranks import run_ranks
from test_train_distributed import Images, Shares, gammas_of, network, new_runtime
from torch import Tensor, nn

from netslim.train import EngineConfig, FitConfig, Record, Runtime, SparsityConfig, fit

STEPS = 8
CONFIG = FitConfig(epochs=1, lr=0.1, schedule="constant")
NUMBERS = {"NaN": torch.nan, "infinity": torch.inf}
WHERE = ("loss", "gradient", "gamma")
BAD = {case: random.Random(str(case)).randrange(1, STEPS - 1) for case in ((a, b) for a in WHERE for b in NUMBERS)}
"""At which step, counted from 0."""
CASES = [*BAD]
NUMBERS["slightly"], BAD["weights", "slightly"] = 1e-3, 2
FOR_GOOD = ("gamma", "NaN")
"""A gamma stays spoiled, so that all steps after it fail too."""
Found = dict[str, tuple[str, dict[str, Tensor]]]
spoiling: dict[str, float] = {}
"""What the layer below spoils now, in this process, and with which number."""


class Spoilable(nn.BatchNorm2d):
    """Spoils inside its forward pass, where every engine has its weights at hand."""

    def forward(self, x: Tensor) -> Tensor:
        if "gamma" in spoiling:
            self.weight.data[0] = spoiling["gamma"]
        if "weights" in spoiling:
            self.weight.data[0] += spoiling["weights"]
        out = super().forward(x)
        if "gradient" in spoiling and out.requires_grad:
            number = spoiling["gradient"]
            out.register_hook(lambda gradient: torch.full_like(gradient, number))
        return out


class Spoiled(Images):
    """Before one step, something on rank 1 becomes NaN or infinite."""

    def __init__(self, run: Runtime, where: str, number: str) -> None:
        super().__init__(run, STEPS)
        self.where, self.number, self.bad = where if run.rank == 1 else "", NUMBERS[number], BAD[where, number]

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(super().epoch(epoch, first_batch)):
            spoiling.clear()
            if step == self.bad:
                spoiling[self.where] = self.number
            yield images * spoiling.get("loss", 1), labels
        spoiling.clear()


class Without(Images):
    """The steps but for one, or only those before it."""

    def __init__(self, run: Runtime, bad: int, *, and_after: bool) -> None:
        super().__init__(run, STEPS)
        self.batches = [*self.batches[:bad], *(self.batches[bad + 1 :] if and_after else [])]


def train(
    directory: Path,
    engine: EngineConfig,
    case: tuple[str, str] | None,
    *,
    bad: int,
    skip: int,
    method: Literal["subgradient", "proximal"] = "subgradient",
) -> tuple:
    """What the error said, and the weights and statistics that are left."""
    run = new_runtime(engine)
    model, said = network(), ""
    gammas = gammas_of(model)
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    layers[-1].__class__ = Spoilable
    images = Without(run, bad, and_after=bool(skip)) if case is None else Spoiled(run, *case)
    config = replace(CONFIG, skip_nonfinite=skip)
    with Record("sparse", directory, is_main=run.is_main) as record, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own
        try:
            sparsity = SparsityConfig(weight=1e-3, method=method)
            fit(model, images, Shares(run, 10), config, run=run, record=record, gammas=gammas, sparsity=sparsity)
        except FloatingPointError as error:
            said = str(error)
    spoiling.clear()
    return said, {name: value.clone() for name, value in model.state_dict().items()}


def stop_at_each(directory: Path) -> dict[tuple[str, str], Found]:
    """Each case, and the training up to it."""
    engine = EngineConfig(batch_norm="frozen")
    return {
        case: {
            "have": train(directory, engine, case, bad=BAD[case], skip=0),
            "want": train(directory, engine, None, bad=BAD[case], skip=0),
        }
        for case in CASES
    }


def stop_later(directory: Path) -> dict[tuple[str, str], Found]:
    """As on a GPU, which is asked now and then: here only when the epoch is over."""
    Runtime.may_wait = lambda self, step: False  # type: ignore[method-assign]
    engine = EngineConfig(batch_norm="frozen")
    return {
        case: {
            "have": train(directory, engine, case, bad=BAD[case], skip=0, method="proximal"),
            "want": train(directory, engine, None, bad=BAD[case], skip=0, method="proximal"),
        }
        for case in (("loss", "NaN"), ("gradient", "infinity"))
    }


def leave_out(directory: Path, zero: int) -> dict[tuple[str, str], Found]:
    """Cases that pass, and the training without their step."""
    engine = EngineConfig(zero=zero)  # type: ignore[arg-type]
    return {
        case: {
            "have": train(directory, engine, case, bad=BAD[case], skip=1),
            "want": train(directory, engine, None, bad=BAD[case], skip=1),
        }
        for case in (("loss", "NaN"), ("gradient", "infinity"))
    } | {("gamma", "NaN"): {"have": train(directory, engine, ("gamma", "NaN"), bad=0, skip=0)}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Found]]:
    directory = tmp_path_factory.mktemp("finite")
    return run_ranks(stop_at_each, 2, directory, directory / "run")


@pytest.mark.parametrize("case", CASES, ids=" is ".join)
def test_no_rank_applies_a_step_that_is_not_finite_on_one(case: tuple[str, str], stopped: list) -> None:
    for results in stopped:
        error, weights = results[case]["have"]
        whose = "the gradient" if case[0] == "gradient" else "the loss of rank 1"
        assert f"sparse: {whose} is not finite at step {BAD[case] + 1} (epoch 1); no rank applied the step" in error
        for name, want in results[case]["want"][1].items():
            have = weights[name]
            if case[0] == "gamma" and not have.isfinite().all():  # what was spoiled itself
                have, want = have[1:], want[1:]
            assert torch.equal(have, want), name


def test_a_step_that_is_not_finite_is_refused_however_late_it_is_found(tmp_path: Path) -> None:
    for results in run_ranks(stop_later, 2, tmp_path, tmp_path / "run"):
        for case, found in results.items():
            (said, have), (_, want) = found["have"], found["want"]
            assert f"not finite at step {BAD[case] + 1} (epoch 1); no rank applied the step" in said
            for name in want:
                assert torch.equal(have[name], want[name]), (case, name)


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_that_may_be_left_out_leaves_nothing_behind(zero: int, tmp_path: Path) -> None:
    for results in run_ranks(leave_out, 2, tmp_path, tmp_path / "run", zero):
        error, _ = results.pop(("gamma", "NaN"))["have"]
        assert f"the loss of rank 1 is not finite at step {BAD['gamma', 'NaN'] + 1} (epoch 1); no rank" in error
        for case, found in results.items():
            (said, have), (_, want) = found["have"], found["want"]
            assert said == ""
            for name in want:
                assert torch.equal(have[name], want[name]), (case, name)


def spoil_weights(directory: Path) -> str:
    try:
        train(directory, EngineConfig(batch_norm="frozen"), ("weights", "slightly"), bad=0, skip=0)
    except RuntimeError as error:
        return str(error)
    return ""


def test_weights_that_come_to_differ_between_ranks_are_found_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    for said in run_ranks(spoil_weights, 2, tmp_path, tmp_path / "run"):
        assert said == "sparse, epoch 1: the weights of rank 1 differ from those of rank 0"


def spoil_all(directory: Path) -> str:
    return str(train(directory, EngineConfig(batch_norm="frozen"), FOR_GOOD, bad=0, skip=1)[0])


def test_training_stops_when_more_steps_are_not_finite_than_may_be_left_out(tmp_path: Path) -> None:
    for said in run_ranks(spoil_all, 2, tmp_path, tmp_path / "run"):
        step = BAD[FOR_GOOD] + 2
        assert f"is not finite at step {step} (epoch 1) after 1 that were left out; no rank applied" in said
