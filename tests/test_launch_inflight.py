"""Channels that sparsity training has brought to zero are cut while it goes on, and nothing else changes."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from ranks import run_ranks
from test_launch_cli import Netslim, assert_one_line, smallest
from test_train_distributed import Images, Shares, new_runtime
from test_train_resume import CrashError, Dying, assert_equal, lines, momenta
from torch import Tensor, nn

from netslim.launch.config import RunConfig
from netslim.launch.run.inflight import InFlight
from netslim.prune import Coupling, Rules, choose_zeros, cost, map_channels, open_gammas
from netslim.train import (
    CheckpointConfig,
    EngineConfig,
    FitConfig,
    ModelConfig,
    Record,
    Saver,
    SparsityConfig,
    Store,
    build_model,
    evaluate,
    fit,
)

STEPS, EPOCHS = 6, 4
CONFIG = FitConfig(epochs=EPOCHS, lr=0.05, schedule="constant")
PROXIMAL = SparsityConfig(weight=0.06, method="proximal", reconfigure_every=1)
WITHIN = replace(PROXIMAL, reconfigure_every=2 / STEPS)
VGG = ModelConfig(name="vgg11", width=0.125)
EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Observed(InFlight):
    """Keeps the test loss before and after each cut."""

    def __init__(self, *arguments: Any, shares: Shares) -> None:
        super().__init__(*arguments)
        self.shares, self.losses = shares, []

    def shrink(
        self, model: nn.Module, momenta: Mapping[str, Tensor], step: int
    ) -> tuple[nn.Module, dict[str, Tensor]] | None:
        before = evaluate(model, self.shares, self.run).loss
        found = super().shrink(model, momenta, step)
        if found is not None:
            after = evaluate(found[0].to(self.run.device), self.shares, self.run).loss
            self.losses.append((before, after, self.num_gone))
        return found


class Spoiled(Images):
    """Images of which one batch of the second epoch is not a number."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (images, labels) in enumerate(super().epoch(epoch, first_batch), first_batch):
            yield images * (math.nan if (epoch, index) == (1, 2) else 1), labels


def train(
    directory: Path,
    engine: EngineConfig,
    sparsity: SparsityConfig = PROXIMAL,
    die_after: int | None = None,
    network: ModelConfig = VGG,
    coupling: Coupling = "group",
    most: float = 1.0,
    spoil: bool = False,
) -> dict[str, Any]:
    """What the training came to: weights in the shapes of the whole network, and the losses around each cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own
        run = new_runtime(engine)
        dense = build_model(network, num_classes=10, seed=3)
        draws = torch.Generator().manual_seed(5)
        for norm in (module for module in dense.modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.05, 1.0, generator=draws)  # so that they do not all arrive at once
        channels, rules = map_channels(dense, EXAMPLE, coupling), Rules(min_share=0.1, coupling=coupling)
        shares = Shares(run, 20)
        slimming = Observed(dense, dense, None, channels, rules, sparsity, run, EXAMPLE, most, shares=shares)
        images = (Spoiled if spoil else Images)(run, STEPS)
        if die_after is not None:
            images = Dying(run, STEPS, batches=die_after)
        checkpoint = CheckpointConfig(steps=1, keep=100)
        saver = Saver(Store(directory / "checkpoints", 100), run, checkpoint, {"stage": "sparse"})
        with Record("sparse", directory, is_main=run.is_main) as record:
            fit(
                dense,
                images,
                shares,
                replace(CONFIG, skip_nonfinite=int(spoil)),
                run=run,
                record=record,
                gammas=open_gammas(dense, channels, rules),
                sparsity=sparsity,
                saver=saver,
                slimming=slimming,
            )
    return {"weights": slimming.result().state_dict(), "losses": slimming.losses, "gone": slimming.num_gone}


@pytest.mark.parametrize(
    ("zero", "world_size"),
    [(0, 2), (2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 1), (1, 1), (1, 2), (2, 1)))],
)
def test_the_loss_is_the_same_before_and_after_a_cut(zero: int, world_size: int, tmp_path: Path) -> None:
    engine = EngineConfig(zero=zero)  # type: ignore[arg-type]
    for found in run_ranks(train, world_size, tmp_path, tmp_path / "run", engine):
        assert len(found["losses"]) >= 2, "cuts"
        assert found["gone"] > 100
        for before, after, _ in found["losses"]:
            assert abs(before - after) <= 1e-5
    channels_gone = [line["channels_gone"] for line in lines(tmp_path / "run")]
    assert channels_gone == sorted(channels_gone)
    macs = [line["macs"] for line in lines(tmp_path / "run")]
    assert macs[-1] < 0.7 * macs[0]
    assert lines(tmp_path / "run")[-1]["macs_spent"] == pytest.approx(sum(macs) / len(macs) / macs[0])


@pytest.mark.parametrize(("zero", "world_size"), [(0, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_channels_go_within_an_epoch_too(zero: int, world_size: int, tmp_path: Path) -> None:
    for found in run_ranks(train, world_size, tmp_path, tmp_path / "run", EngineConfig(zero=zero), WITHIN):  # type: ignore[arg-type]
        assert len(found["losses"]) > EPOCHS, "cuts"
        for before, after, _ in found["losses"]:
            assert abs(before - after) <= 1e-5
    whole = cost(build_model(VGG, num_classes=10, seed=0), EXAMPLE[:1]).macs
    ends = [line["macs"] for line in lines(tmp_path / "run")]
    beginnings = [whole, *ends[:-1]]
    spent = lines(tmp_path / "run")[-1]["macs_spent"] * whole * EPOCHS
    assert sum(ends) < spent < sum(beginnings)


def test_a_step_after_a_cut_within_an_epoch_is_left_out_like_any_other(tmp_path: Path) -> None:
    arguments = (EngineConfig(), WITHIN, None, VGG, "group", 1.0, True)
    (found,) = run_ranks(train, 1, tmp_path, tmp_path / "run", *arguments)
    assert len(found["losses"]) > EPOCHS, "cuts"
    assert lines(tmp_path / "run")[-1]["skipped_steps"] == 1
    assert all(weight.isfinite().all() for weight in found["weights"].values())


@pytest.mark.slow
def test_a_compiled_network_is_compiled_anew_after_every_cut(tmp_path: Path) -> None:
    (found,) = run_ranks(train, 1, tmp_path, tmp_path / "run", EngineConfig(compile=True))
    assert len(found["losses"]) >= 2, "cuts"
    for before, after, _ in found["losses"]:
        assert abs(before - after) <= 1e-5


def test_every_engine_trains_to_the_same_weights(tmp_path: Path) -> None:
    engines = [EngineConfig(batch_norm="frozen", zero=zero) for zero in (0, 1, 2)]  # type: ignore[arg-type]
    found = []
    for index, engine in enumerate(engines):
        (tmp_path / str(index)).mkdir()
        found.append(run_ranks(train, 1 + index % 2, tmp_path / str(index), tmp_path / f"{index}-run", engine)[0])
    assert found[0]["gone"] > 0
    for other in found[1:]:
        assert other["gone"] == found[0]["gone"]
        for name, want in found[0]["weights"].items():
            torch.testing.assert_close(other["weights"][name], want, rtol=1e-4, atol=1e-5, msg=name)


def train_and_crash(
    directory: Path, engine: EngineConfig, crashes: list[int], sparsity: SparsityConfig
) -> dict[int, dict[str, Any]]:
    found = {}
    for crash in (-1, *crashes):
        place = directory / str(crash)
        if crash >= 0:
            with pytest.raises(CrashError):
                train(place, engine, sparsity, die_after=crash)
        found[crash] = {**train(place, engine, sparsity), "checkpoint": momenta(place)}
    return found


MORE = [STEPS - 1, STEPS, STEPS + 1, 2 * STEPS, 2 * STEPS + 1, 3 * STEPS - 1]


@pytest.mark.parametrize(
    ("zero", "world_size", "crashes"),
    [
        (0, 2, [STEPS - 1, 2 * STEPS, 2 * STEPS + 1]),
        (2, 1, [2 * STEPS]),
        *(pytest.param(*case, MORE, marks=pytest.mark.slow) for case in ((0, 1), (0, 2), (1, 2), (2, 1))),
    ],
)
def test_a_crash_after_any_batch_around_a_cut_changes_nothing(
    zero: int, world_size: int, crashes: list[int], tmp_path: Path
) -> None:
    crash_and_compare(world_size, tmp_path, EngineConfig(zero=zero), crashes, PROXIMAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("crashes", [[4, STEPS + 5], pytest.param([3, 4, 5, STEPS + 4], marks=pytest.mark.slow)])
def test_a_crash_after_any_batch_around_a_cut_within_an_epoch_changes_nothing(
    crashes: list[int], tmp_path: Path
) -> None:
    crash_and_compare(2, tmp_path, EngineConfig(), crashes, WITHIN)


def crash_and_compare(
    world_size: int, tmp_path: Path, engine: EngineConfig, crashes: list[int], sparsity: SparsityConfig
) -> None:
    for results in run_ranks(train_and_crash, world_size, tmp_path, tmp_path / "runs", engine, crashes, sparsity):
        assert results[-1]["losses"][0][2] < results[-1]["gone"], "more than one cut"
        for crash, result in results.items():
            assert_equal(result["weights"], results[-1]["weights"])
            assert_equal(result["checkpoint"], results[-1]["checkpoint"])
            assert lines(tmp_path / "runs" / str(crash)) == lines(tmp_path / "runs" / "-1")


def test_a_damaged_plan_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    run_ranks(crash_with_another_plan, 1, tmp_path, tmp_path / "run")


def crash_with_another_plan(directory: Path) -> None:
    with pytest.raises(CrashError):
        train(directory, EngineConfig(), die_after=3 * STEPS)
    store = Store(directory / "checkpoints", 100)
    found = store.newest(print)
    assert found is not None
    assert found.values["slimmed"] is not None
    store.save(replace(found, values={**found.values, "slimmed": "{}"}), None)
    with pytest.raises(
        ValueError, match=r"the checkpoint after step \d+ in .*checkpoints is not one that this run saves"
    ):
        train(directory, EngineConfig())


@pytest.mark.parametrize("coupling", ["group", "select"])
def test_residual_networks_are_cut_in_flight_too(coupling: Coupling, tmp_path: Path) -> None:
    network = ModelConfig(name="preresnet20", width=0.5)
    (found,) = run_ranks(train, 1, tmp_path, tmp_path / "run", EngineConfig(), PROXIMAL, None, network, coupling)
    assert found["gone"] > 50
    assert all(abs(before - after) <= 1e-5 for before, after, _ in found["losses"])


def test_channels_near_zero_go_by_the_subgradient_and_their_constants_stay(tmp_path: Path) -> None:
    near = replace(PROXIMAL, method="subgradient", reconfigure_below=0.05)
    (found,) = run_ranks(train, 1, tmp_path, tmp_path / "run", EngineConfig(), near)
    assert found["gone"] > 20
    for before, after, _ in found["losses"]:
        assert before != after
        assert abs(before - after) < 0.1


def test_no_more_channels_go_in_flight_than_the_ratio_asks_for(tmp_path: Path) -> None:
    arguments = (EngineConfig(), PROXIMAL, None, VGG, "group", 0.2)
    (found,) = run_ranks(train, 1, tmp_path, tmp_path / "run", *arguments)
    num = sum(len(weight) for name, weight in found["weights"].items() if name.endswith("running_mean"))
    assert found["gone"] == num // 5


def test_what_is_gone_has_gamma_and_beta_zero_and_a_ratio_counts_it(
    netslim: Netslim, tmp_path: Path, data_cache: Path
) -> None:
    flags = [*smallest(tmp_path / "run", data_cache), "--sparsify.epochs", 3, "--sparsity.method", "proximal"]
    flags += [
        "--sparsity.weight",
        0.5,
        "--sparsity.reconfigure-every",
        1,
        "--prune.ratio",
        0.5,
        "--record.wandb",
        "disabled",
    ]
    code, said = netslim("run", *flags)
    assert code == 0, said
    last = json.loads((tmp_path / "run" / "sparse" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["channels_gone"] > 0
    plan = json.loads((tmp_path / "run" / "prune-0.50" / "plan.json").read_text())
    assert plan["num_removed"] == plan["num_channels"] // 2


def test_zeros_go_but_for_what_the_rules_hold() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    channels = map_channels(model, EXAMPLE, "group")
    scores = {"1": torch.tensor([0.0, 2, 0, 0, 0, 3]), "4": torch.tensor([0.0, 0, 0, 0])}
    plan = choose_zeros(scores, channels, Rules(min_channels=3))
    assert {layer.name: layer.kept for layer in plan.layers} == {"1": (1, 4, 5), "4": (1, 2, 3)}
    assert plan.ratio == plan.num_removed / plan.num_channels == 0.4
    plan = choose_zeros(scores, channels, Rules(), most=0.3)
    assert {layer.name: layer.kept for layer in plan.layers} == {"1": (1, 4, 5), "4": (0, 1, 2, 3)}
    assert choose_zeros({name: score + 1 for name, score in scores.items()}, channels, Rules()).num_removed == 0


def test_a_penalty_that_brings_nothing_to_zero_is_refused(netslim: Netslim, tmp_path: Path, data_cache: Path) -> None:
    flags = [*smallest(tmp_path / "run", data_cache), "--sparsity.reconfigure-every", 1]
    code, said = netslim("run", *flags)
    assert code == 2
    assert_one_line(said, "sparsity.reconfigure_every", "proximal", "sparsity.reconfigure_below")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "engine", "interval"),
    [("proximal", "ddp", 5), ("proximal", "zero2", 5), ("proximal", "zero3", 0), ("subgradient", "ddp", 0)],
)
def test_channels_go_in_flight_by_default_where_zeros_are_exact_and_gammas_whole(
    method: Literal["subgradient", "proximal"], engine: str, interval: int
) -> None:
    assert SparsityConfig(method=method).interval(engine) == interval
    assert SparsityConfig(method=method, reconfigure_every=0).interval(engine) == 0


def test_zero_stage_3_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.zero 0, 1 or 2"):
        RunConfig(sparsity=PROXIMAL, engine=EngineConfig(zero=3))
