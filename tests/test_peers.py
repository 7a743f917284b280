"""Where another pruning library, side by side with this one, failed or did something else: what netslim does there."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_prune_nets import EXAMPLE, Residual, chain, scramble
from test_prune_zoo import assert_exact, assert_trains, build, images, slimmed
from test_train_distributed import CONFIG, Images, Shares, gammas_of, network, new_runtime
from torch import Tensor, nn
from torchvision import models

from netslim.prune import ChannelMap, Plan, cut, largest_difference, load, make_plan, map_channels, save, slim
from netslim.train import EngineConfig, GammaPenalty, Record, SparsityConfig, fit, make_optimizer

CHANNELS = 5504


@pytest.fixture(scope="module")
def vgg19() -> ChannelMap:
    with torch.device("meta"):  # the map asks for shapes only
        return map_channels(models.vgg19_bn(weights=None, init_weights=False), EXAMPLE)


def removed(plan: Plan) -> set[tuple[str, int]]:
    return {(layer.name, index) for layer in plan.layers for index in set(range(layer.width)) - set(layer.kept)}


def smallest(gammas: Mapping[str, Tensor], count: int) -> set[tuple[str, int]]:
    sizes = [(abs(value), name, index) for name, gamma in gammas.items() for index, value in enumerate(gamma.tolist())]
    return {(name, index) for _, name, index in sorted(sizes)[:count]}


def jaccard(left: set[Any], right: set[Any]) -> float:
    return len(left & right) / len(left | right)


@pytest.fixture
def gammas(vgg19: ChannelMap) -> dict[str, Tensor]:
    """Gammas of a VGG-19 as slimming leaves them: those of deep layers a hundredth of those of the first."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, len(vgg19.layers))
    return {
        layer.name: scale * torch.randn(layer.width, generator=generator).exp()
        for layer, scale in zip(vgg19.layers, scales, strict=True)
    }


# Networks of torchvision's registry


def test_shufflenet_is_cut_exactly():
    """There: ZeroDivisionError."""
    assert_exact(slimmed(build("shufflenet_v2_x0_5"), images(32), "group"))


@pytest.mark.parametrize(("name", "size", "num_heads"), [("googlenet", 64, 3), ("inception_v3", 299, 2)])
def test_networks_with_auxiliary_heads_train_after_the_cut(name, size, num_heads):
    """There: the forward pass of training is broken."""
    model = scramble(models.get_model(name, weights=None, init_weights=False, aux_logits=True))
    example = images(size)[:2]
    channels = map_channels(model, example)
    small = cut(model, make_plan(channels.named_gammas(model), channels, ratio=0.5))
    assert len(small.train()(example)) == num_heads
    assert_trains(small, example)


def test_maxvit_is_mapped_and_cut_in_bounded_time():
    """There: it never ends."""
    model = scramble(models.maxvit_t(weights=None))
    _, plan = slim(model, images(224)[:1], ratio=0.5)  # raises where cut and masked network differ
    assert plan.num_removed >= 0.99 * plan.num_asked


# The threshold


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_the_threshold_is_that_of_the_raw_gammas_of_all_layers(ratio, vgg19, gammas):
    """There: each gamma is divided by the mean of its layer; Jaccard index 0.66 with the exact set."""
    plan = make_plan(gammas, vgg19, ratio=ratio)
    assert not plan.spared
    assert jaccard(removed(plan), smallest(gammas, int(ratio * CHANNELS))) == 1.0


def test_layers_wholly_below_the_threshold_are_thinned_and_the_share_is_exact(vgg19, gammas):
    """There: they stay at full width, and 23.5 % go where 70 % was asked."""
    low = [layer.name for layer in vgg19.layers[-5:]]
    for name in low:
        gammas[name] *= 1e-4
    plan = make_plan(gammas, vgg19, ratio=0.7)
    assert plan.num_removed == len(removed(plan)) == 7 * CHANNELS // 10
    assert [len(plan.kept[name]) for name in low] == [1] * 5


def test_a_layer_with_one_channel_above_the_threshold_and_one_with_none_both_keep_one(vgg19, gammas):
    """There: one ends with 1 channel, the other with all 512."""
    one, none = (vgg19.layers[index].name for index in (10, 11))
    gammas[one] *= 1e-6
    gammas[one][77] = 1e3
    gammas[none] *= 1e-6
    plan = make_plan(gammas, vgg19, ratio=0.5)
    assert plan.kept[one] == (77,)
    assert plan.kept[none] == (int(gammas[none].argmax()),)
    assert plan.num_removed == CHANNELS // 2


def test_a_layer_keeps_the_share_that_max_ratio_leaves_it(vgg19, gammas):
    """There: 25 of 512 were left."""
    layer = vgg19.layers[10]
    gammas[layer.name][: int(0.9 * layer.width)] *= 1e-6
    plan = make_plan(gammas, vgg19, ratio=0.3, max_ratio=0.5)
    assert (layer.width, len(plan.kept[layer.name])) == (512, 256)
    assert plan.num_removed == 3 * CHANNELS // 10


def test_of_equal_gammas_only_as_many_go_as_were_asked(vgg19):
    """There: 90 % go where 30 % was asked."""
    gammas = {layer.name: torch.full((layer.width,), 0.1) for layer in vgg19.layers}
    for gamma in gammas.values():
        gamma[::10] = 1.0
    assert make_plan(gammas, vgg19, ratio=0.3).num_removed == 3 * CHANNELS // 10


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "regnet_y_400mf"])
def test_coupled_networks_lose_exactly_the_smallest_gammas(name):
    """There: Jaccard index 0.70, 0.61, 0.51 and 0.43 with the exact set."""
    model = scramble(models.get_model(name, weights=None))
    channels = map_channels(model, EXAMPLE, "select")
    gammas = channels.named_gammas(model, "select")
    plan = make_plan(gammas, channels, ratio=0.5, coupling="select")
    assert jaccard(removed(plan), smallest(gammas, plan.num_channels // 2)) == 1.0


# The penalty

LR, LAMBDA = 0.5, 0.125


def stepped(model: nn.Module, weight: float, how: str) -> list[Tensor]:
    """Take one step with this lambda; return what became of the gammas."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    GammaPenalty(model, weight).attach(optimizer)
    if how == "gradient scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scaler.scale(model(EXAMPLE).square().mean()).backward()
        scaler.step(optimizer)
    else:
        for _ in range(parts := 4 if how == "accumulation" else 1):
            (model(EXAMPLE).square().mean() / parts).backward()
        if how == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("how", ["gradient scaler", "accumulation", "clipping", "synchronised BatchNorm"])
def test_every_gamma_moves_by_the_learning_rate_times_lambda(how):
    """There: by 2e-5, 4, 0.12 and 0 times as much."""
    torch.manual_seed(0)
    model = scramble(Residual())
    if how == "synchronised BatchNorm":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    gammas = zip(stepped(model, LAMBDA, how), stepped(model, 0.0, how), strict=True)
    for with_penalty, without in gammas:  # all of them are above zero
        torch.testing.assert_close(with_penalty - without, torch.full_like(without, -LR * LAMBDA), rtol=0, atol=1e-6)


@pytest.mark.parametrize("coupling", ["group", "select"])
def test_a_network_with_synchronised_batchnorms_is_cut_like_any_other(coupling):
    torch.manual_seed(0)
    plain = scramble(Residual()).eval()
    _, want = slim(plain, EXAMPLE, ratio=0.5, coupling=coupling)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    small, plan = slim(model, EXAMPLE, ratio=0.5, coupling=coupling)
    assert plan == want
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in small.modules()) == 3
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-10


# Pruning between two phases of distributed training


CONTINUED = replace(CONFIG, lr=0.01)
NUM_STEPS = 5


def train_cut_and_train(directory: Path) -> dict[str, Any]:
    """Train with the penalty, cut, and train on, in this process's share of the work."""
    run = new_runtime(EngineConfig(batch_norm="frozen"))
    model = scramble(network())
    train, test = Images(run, NUM_STEPS), Shares(run, 10)
    with Record("phases", directory, is_main=run.is_main) as record:
        sparsity = SparsityConfig(weight=1e-3)
        fit(model, train, test, CONFIG, run=run, record=record, gammas=gammas_of(model), sparsity=sparsity)
        channels = map_channels(model, torch.zeros(1, 3, 16, 16))
        plan = make_plan(channels.named_gammas(model), channels, ratio=0.5)
        small = cut(model, plan)
        before = copy.deepcopy(small.state_dict())
        fit(small, train, test, CONTINUED, run=run, record=record)
    return {"plan": plan.to_json(), "before": before, "after": small.state_dict()}


def trained_alone(model: nn.Module) -> dict[str, Tensor]:
    """Take the steps of the second phase in plain torch, each on a whole batch."""
    optimizer = make_optimizer(model.eval(), CONTINUED)
    alone: Any = SimpleNamespace(rank=0, world_size=1, config=EngineConfig(), device=torch.device("cpu"))
    for batch, labels in Images(alone, NUM_STEPS).epoch(0):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
    return model.state_dict()


def test_after_a_cut_between_two_phases_the_ranks_still_train_as_one(tmp_path):
    """There: gradients are no longer averaged, and the old optimizer holds 1 of 62 live parameters."""
    first, second = run_ranks(train_cut_and_train, 2, tmp_path, tmp_path / "run")
    assert first["plan"] == second["plan"]
    small = cut(network(), Plan.from_json(first["plan"]))
    small.load_state_dict(first["before"])
    want = trained_alone(small)
    for name, value in first["after"].items():
        assert torch.equal(value, second["after"][name]), name
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)
    assert not any(torch.equal(first["before"][name], first["after"][name]) for name, _ in small.named_parameters())


# What is saved


def test_a_slim_network_is_saved_without_pickle_and_its_state_dict_fits(tmp_path):
    """There: a pickled module, and a plain state dict that does not fit."""
    torch.manual_seed(0)
    small, plan = slim(scramble(chain(12, 10)).eval(), EXAMPLE, ratio=0.5)
    save(small, plan, tmp_path / "slim")
    assert sorted(file.name for file in (tmp_path / "slim").iterdir()) == ["plan.json", "weights.safetensors"]
    again = load(tmp_path / "slim", lambda: chain(12, 10)).eval()
    assert torch.equal(again(EXAMPLE), small(EXAMPLE))
    torch.save(small.state_dict(), tmp_path / "state.pt")
    other = cut(chain(12, 10), plan).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(EXAMPLE), small(EXAMPLE))
