"""Every engine, at any number of ranks, trains to the weights of a plain loop in one process."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import DEVICE, compute_exactly, run_ranks
from test_train_distributed import BATCH, STEPS, Images, Shares, flat, gammas_of, network, new_runtime, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from netslim.prune import make_plan, map_channels
from netslim.train import EngineConfig, FitConfig, Record, SparsityConfig, fit
from netslim.train.prepared import Prepared

Case = tuple[str, int, float | None]
LAMBDA, MOMENTUM, LR, DECAY = 1e-2, 0.9, 0.1, 1e-4
CASES: list[Case] = list(itertools.product(["subgradient", "proximal"], [1, 4], [None, 0.05]))
"""Method, accumulation, clip."""


def name_of(method: str, accumulation: int, clip: float | None) -> str:
    return f"{method}, accumulation {accumulation}, clip {clip}"


def reference(method: str, clip: float | None) -> nn.Module:
    """The same training, written out; accumulation changes nothing in it."""
    compute_exactly()
    model, velocity = network().to(DEVICE), {}
    model.eval()  # frozen statistics
    for images, labels in WholeBatches():
        model.zero_grad()
        F.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        gammas = {id(gamma) for gamma in gammas_of(model)}
        with torch.no_grad():
            for name, p in model.named_parameters():
                assert p.grad is not None
                gradient = p.grad + DECAY * p
                if id(p) in gammas and method == "subgradient":
                    gradient = gradient + LAMBDA * p.sign()
                velocity[name] = MOMENTUM * velocity[name] + gradient if name in velocity else gradient
                p -= LR * velocity[name]
                if id(p) in gammas and method == "proximal":
                    p.copy_(p.sign() * (p.abs() - LAMBDA * LR / (1 - MOMENTUM)).clamp_min(0))
    return model.cpu()


class WholeBatches:
    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(7)
        images = torch.randn(STEPS * BATCH, 3, 16, 16, generator=generator)
        labels = torch.randint(0, 10, (STEPS * BATCH,), generator=generator)
        return zip(images.split(BATCH), labels.split(BATCH), strict=True)


def train_all(directory: Path, zero: int, cases: list[Case], precision: str = "no") -> dict[str, dict[str, Tensor]]:
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own
        for method, accumulation, clip in cases:
            engine = EngineConfig(
                batch_norm="frozen",
                accumulation=accumulation,
                zero=zero,  # type: ignore[arg-type]
                precision=precision,  # type: ignore[arg-type]
            )
            run = new_runtime(engine)
            assert run.engine == (f"zero{zero}" if zero else "ddp")
            model = network()
            config = FitConfig(epochs=1, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, schedule="constant", clip=clip)
            with Record("sparse", directory, is_main=run.is_main) as record:
                fit(
                    model,
                    Images(run),
                    Shares(run, 10),
                    config,
                    run=run,
                    record=record,
                    gammas=gammas_of(model),
                    sparsity=SparsityConfig(weight=LAMBDA, method=method),  # type: ignore[arg-type]
                )
            results[name_of(method, accumulation, clip)] = model.state_dict()
    return results


@pytest.fixture(scope="module")
def wanted() -> dict[str, nn.Module]:
    found = {(method, clip): reference(method, clip) for method in ("subgradient", "proximal") for clip in (None, 0.05)}
    return {name_of(*case): found[case[0], case[2]] for case in CASES}


def assert_as_wanted(found: list[dict[str, dict[str, Tensor]]], wanted: dict[str, nn.Module]) -> None:
    for case in found[0]:
        model = wanted[case]
        want = model.state_dict()
        for rank, results in enumerate(found):
            have = results[case]
            assert relative_error(flat(have), flat(want)) <= 1e-6, (case, rank)
            for name in gamma_names():
                assert relative_error(have[name], want[name]) <= 1e-6, (case, rank, name)
        twin = network()
        twin.load_state_dict(found[0][case])
        assert removed(twin) == removed(model), case


def gamma_names() -> list[str]:
    return [f"{name}.weight" for name, module in network().named_modules() if isinstance(module, nn.BatchNorm2d)]


def removed(model: nn.Module) -> dict[str, tuple[int, ...]]:
    channels = map_channels(model, torch.zeros(1, 3, 16, 16))
    return make_plan(channels.named_gammas(model), channels, ratio=0.5).kept


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_an_engine_trains_to_the_weights_of_a_plain_loop(
    zero: int, wanted: dict[str, nn.Module], tmp_path: Path
) -> None:
    cases = [("subgradient", 4, 0.05), ("proximal", 1, None)]  # all of them are of the slow test
    assert_as_wanted(run_ranks(train_all, 2, tmp_path, tmp_path / "run", zero, cases), wanted)


@pytest.mark.parametrize("zero", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_an_engine_trains_in_bf16_within_its_precision(zero: int, wanted: dict[str, nn.Module], tmp_path: Path) -> None:
    case: Case = ("subgradient", 1, None)
    want = wanted[name_of(*case)].state_dict()
    for found in run_ranks(train_all, 2, tmp_path, tmp_path / "run", zero, [case], "bf16"):
        have = found[name_of(*case)]
        assert relative_error(flat(have), flat(want)) < 2**-8  # of one rounding
        assert all(have[name].dtype == torch.float32 for name in gamma_names())
        assert max(relative_error(have[name], want[name]) for name in gamma_names()) < 2**-8


def moved_while_frozen(zero: int) -> dict[str, list[float]]:
    """How far gammas 0, 1 and 2 have moved in a step, by the method: 0 was frozen before, 1 once prepared."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own
        for method in ("subgradient", "proximal"):
            run = new_runtime(EngineConfig(zero=zero))  # type: ignore[arg-type]
            model = network()
            gammas = gammas_of(model)
            before = [gamma.detach().clone() for gamma in gammas]
            gammas[0].requires_grad_(False)
            config = FitConfig(lr=LR, weight_decay=0.1)
            sparsity = SparsityConfig(weight=LAMBDA, method=method)  # type: ignore[arg-type]
            prepared = Prepared(model, config, run, gammas, sparsity, None)
            gammas_of(prepared.trained)[1].requires_grad_(False)
            for images, labels in Images(run, 1).batches:
                with run.accumulate(prepared.wrapped):
                    loss, _ = prepared.forward(images, labels)
                    run.backward(loss)
                    prepared.stepper.step()
                    prepared.stepper.zero_grad()
            prepared.bring_back()
            after = [gamma.detach().cpu() for gamma in gammas_of(model)]
            found[method] = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)][:3]
            run.release()
    return found


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_frozen_gamma_stays_under_every_engine(zero: int, tmp_path: Path) -> None:
    for found in run_ranks(moved_while_frozen, 2, tmp_path, zero):
        for method, (before, later, never) in found.items():
            assert before == 0, method
            assert later == 0, method
            assert never > 0, method


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_engine_method_accumulation_and_clip_train_to_the_same_weights(
    world_size: int, zero: int, wanted: dict[str, nn.Module], tmp_path: Path
) -> None:
    assert_as_wanted(run_ranks(train_all, world_size, tmp_path, tmp_path / "run", zero, CASES), wanted)
