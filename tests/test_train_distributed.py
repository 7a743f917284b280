"""Training on real gloo ranks against the same training on one."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from ranks import DEVICE, run_ranks
from torch import Tensor, nn

from netslim.data import DataConfig, Shard, open_loaders, prepare
from netslim.train import (
    EngineConfig,
    FitConfig,
    ModelConfig,
    Record,
    Runtime,
    SparsityConfig,
    build_model,
    evaluate,
    fit,
)

BATCH = 16
STEPS = 20
CASES = {
    "plain": (EngineConfig(batch_norm="frozen"), None),
    "accumulation 4": (EngineConfig(batch_norm="frozen", accumulation=4), None),
    "clipping": (EngineConfig(batch_norm="frozen"), 0.05),
    "bf16 between ranks": (EngineConfig(batch_norm="frozen", all_reduce="bf16"), None),
    "bf16": (EngineConfig(batch_norm="frozen", precision="bf16"), None),
}
ROUNDED = ("bf16", "fp16", "bf16 between ranks")
if DEVICE == "cuda":
    CASES["fp16"] = (EngineConfig(batch_norm="frozen", precision="fp16"), None)
    CASES["compile"] = (EngineConfig(batch_norm="frozen", compile=True), None)
CONFIG = FitConfig(epochs=1, lr=0.1, schedule="constant")


class Images:
    """The same global batches at any number of ranks and accumulation steps."""

    def __init__(self, run: Runtime, steps: int = STEPS) -> None:
        generator = torch.Generator().manual_seed(7)
        images = torch.randn(steps * BATCH, 3, 16, 16, generator=generator).to(run.device)
        labels = torch.randint(0, 10, (steps * BATCH,), generator=generator).to(run.device)
        parts = run.world_size * run.config.accumulation
        micro_batches = zip(images.split(BATCH // parts), labels.split(BATCH // parts), strict=True)
        self.batches = list(micro_batches)[run.rank :: run.world_size]

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches[first_batch:])

    def __len__(self) -> int:
        return len(self.batches)


class Shares:
    """``total`` test images, of which this rank has its share; not divisible by the ranks."""

    def __init__(self, run: Runtime, total: int) -> None:
        generator = torch.Generator().manual_seed(11)
        images = torch.randn(total, 3, 16, 16, generator=generator)
        labels = torch.randint(0, 10, (total,), generator=generator)
        self.images = images[run.rank :: run.world_size].to(run.device)
        self.labels = labels[run.rank :: run.world_size].to(run.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(self.images.split(64), self.labels.split(64), strict=True)))


def network() -> nn.Module:
    return build_model(ModelConfig(name="vgg11", width=0.125, initial_gamma=1.0), num_classes=10, seed=3)


def gammas_of(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def new_runtime(engine: EngineConfig) -> Runtime:
    """A second engine in one process: only tests have more than one."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    if DEVICE == "cuda" and os.environ["WORLD_SIZE"] != "1":
        engine = replace(engine, backend="gloo")  # nccl wants a GPU for each rank
    return Runtime(engine, seed=0)


def train(engine: EngineConfig, config: FitConfig, weight: float, directory: Path, steps: int = STEPS) -> nn.Module:
    run = new_runtime(engine)
    model = network()
    sparsity = SparsityConfig(weight=weight)
    with Record("sparse", directory, is_main=run.is_main) as record:
        fit(
            model,
            Images(run, steps),
            Shares(run, 10),
            config,
            run=run,
            record=record,
            gammas=gammas_of(model),
            sparsity=sparsity,
        )
    return model


def train_all_cases(directory: Path, cache: Path) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, (engine, clip) in CASES.items():
        results[name] = train(engine, replace(CONFIG, clip=clip), 1e-3, directory).state_dict()
        # one step with and one without the penalty, from the same weights
        one_step = replace(CONFIG, lr=0.5, clip=clip)
        with_penalty = train(engine, one_step, 0.25, directory, steps=1)
        without = train(engine, one_step, 0.0, directory, steps=1)
        moved = zip(gammas_of(with_penalty), gammas_of(without), strict=True)
        results[f"{name}: moved by the penalty"] = {str(i): (a - b).detach() for i, (a, b) in enumerate(moved)}
    return results | evaluate_alone(directory, cache)


def evaluate_alone(_: Path, cache: Path) -> dict[str, dict[str, Tensor]]:
    return {"digits": {"counts": evaluate_untrained(cache)}}


def evaluate_untrained(cache: Path) -> Tensor:
    """Correct and all test images of the digits, classified by a network that knows nothing."""
    run = new_runtime(EngineConfig())
    config = DataConfig(source="digits", size=16, batch_size=96, cache=cache)
    info = prepare(config, quiet=True)
    loaders = open_loaders(config, info, Shard(run.rank, run.world_size), seed=0, device=run.device)
    result = evaluate(network(), loaders.test, run)
    return torch.tensor([result.correct, result.total])


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by the number of ranks."""
    results = {}
    for world_size in (1, 2, 3):
        directory = tmp_path_factory.mktemp(f"ranks-{world_size}")
        function = evaluate_alone if world_size == 3 else train_all_cases
        results[world_size] = run_ranks(function, world_size, directory, directory / "run", data_cache)
    return results


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten().double() for value in state.values() if value.is_floating_point()])


def relative_error(left: Tensor, right: Tensor) -> float:
    return ((left.double() - right.double()).norm() / right.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ROUNDED])
def test_two_ranks_train_to_the_weights_that_one_rank_reaches(case: str, by_ranks: dict[int, Any]) -> None:
    one, two = by_ranks[1][0][case], by_ranks[2][0][case]
    errors = {name: relative_error(two[name], one[name]) for name in one if one[name].is_floating_point()}
    assert max(errors.values()) <= 1e-6, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("half", [case for case in CASES if case in ("bf16", "fp16")])
def test_a_second_rank_changes_a_run_in_16_bits_by_no_more_than_their_rounding(
    half: str, by_ranks: dict[int, Any]
) -> None:
    float32, one, two = (flat(by_ranks[n][0][case]) for n, case in ((1, "plain"), (1, half), (2, half)))
    rounding = relative_error(one, float32)
    assert rounding < 2**-5
    assert relative_error(two, float32) < 1.5 * rounding
    # runs that each round by themselves differ by the root of 2 times that, on one CPU or another by less
    assert relative_error(two, one) < 1.5 * rounding


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_penalty_moves_each_gamma_by_lr_times_lambda_once(
    case: str, world_size: int, by_ranks: dict[int, Any]
) -> None:
    for moved in by_ranks[world_size][0][f"{case}: moved by the penalty"].values():
        torch.testing.assert_close(moved, torch.full_like(moved, -0.5 * 0.25), rtol=0, atol=1e-6)


def test_gradients_sent_in_bf16_change_a_run_by_no_more_than_their_rounding(by_ranks: dict[int, Any]) -> None:
    plain, rounded = (flat(by_ranks[2][0][case]) for case in ("plain", "bf16 between ranks"))
    assert 1e-6 < relative_error(rounded, plain) < 2**-10


def test_all_ranks_end_with_bitwise_equal_weights(by_ranks: dict[int, Any]) -> None:
    first, second = by_ranks[2]
    for case in CASES:
        assert all(torch.equal(first[case][name], second[case][name]) for name in first[case])


def test_one_two_and_three_ranks_count_the_same_correct_images_of_355(by_ranks: dict[int, Any]) -> None:
    counts = {tuple(result["digits"]["counts"].tolist()) for results in by_ranks.values() for result in results}
    assert len(counts) == 1
    assert next(iter(counts))[1] == 355  # divisible neither by 2 nor by 3


def modes_around_an_evaluation() -> list[list[bool]]:
    run = new_runtime(EngineConfig())
    model = network().train()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before = [module.training for module in model.modules()]
    evaluate(model, Shares(run, 10), run)
    return [before, [module.training for module in model.modules()]]


def test_after_an_evaluation_each_module_is_in_the_mode_it_was_in(tmp_path: Path) -> None:
    ((before, after),) = run_ranks(modes_around_an_evaluation, 1, tmp_path)
    assert after == before
    assert len(set(after)) == 2
