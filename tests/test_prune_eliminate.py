"""The score that knows what reconstruction restores, and the fit that knows of the ReLU after it."""

from contextlib import nullcontext

import pytest
import torch
from ranks import run_ranks
from test_prune_nets import EXAMPLE, NETS, chain, scramble
from test_prune_repair import Odd, calibration, difference, doubled, images_and_labels, peak, wide
from torch import Tensor, nn

from netslim.prune import Calibration, largest_difference, map_channels, repair, score_channels, slim
from netslim.prune.choose.rules import Rules
from netslim.prune.repair import foresight
from netslim.prune.repair.hinge import Hinge, Rows, refine
from netslim.prune.repair.ridge import Line, Moments, solve
from netslim.train import EngineConfig, Runtime

RULES = Rules(score="reconstruction")


def net() -> nn.Module:
    """Two convolutions of one by one, so that the second's inputs can be had without unfolding."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 1, bias=False), nn.BatchNorm2d(5)]
    return scramble(nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10))).eval()


def scores_of(model: nn.Module, images: Calibration | None = None) -> dict[str, Tensor]:
    images = images or calibration()
    return score_channels(model, map_channels(model, images.example), RULES, images)


@torch.no_grad()
def lost(model: nn.Module, kept: list[int], images: Tensor) -> float:
    """Share of the variance of layer 3, scaled as its BatchNorm does, that no weights on these channels give."""
    before = model[:3](images).double().movedim(1, -1).flatten(0, -2)
    after = model[3](model[:3](images)).double().movedim(1, -1).flatten(0, -2)
    after = after * model[4].weight.double() / (model[4].running_var.double() + model[4].eps).sqrt()
    before, after = before - before.mean(0), after - after.mean(0)
    left = after - before[:, kept] @ torch.linalg.lstsq(before[:, kept], after, driver="gelsd").solution
    return float(left.square().sum() / after.square().sum())


def test_channels_are_scored_in_the_order_and_by_the_loss_of_an_elimination_by_least_squares():
    model = net()
    images, labels = images_and_labels(64, 4)  # of so few places that all are looked at
    scores = scores_of(model, Calibration.of(images, labels))["1"]
    kept, before, most = list(range(7)), 0.0, 0.0
    for channel in scores.argsort(stable=True).tolist()[:-1]:
        costs = {each: lost(model, [x for x in kept if x != each], images) - before for each in kept}
        assert channel == min(costs, key=costs.__getitem__)
        most = max(most, costs[channel])
        assert scores[channel].item() == pytest.approx(most, rel=0.02, abs=1e-4)
        kept.remove(channel)
        before += costs[channel]


def test_a_channel_that_others_can_replace_goes_first_however_large_its_gamma():
    model = net()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 2 * model[0].weight[2], 2 * model[0].bias[2]
        for name in ("weight", "bias", "running_mean"):
            getattr(model[1], name)[3] = getattr(model[1], name)[2] * (4 if name != "running_mean" else 2)
        model[1].running_var[3] = 4 * (model[1].running_var[2] + model[1].eps) - model[1].eps
        model[1].weight[2:4] *= 10
        model[1].bias[2:4] *= 10
    first, second = scores_of(model)["1"].argsort()[:2].tolist()
    assert first in (2, 3)
    assert second not in (2, 3)


def test_where_channels_can_be_replaced_it_finds_them_whatever_their_gammas():
    """The network of `doubled` with each pair scaled by another factor, which the layers that read it undo."""
    model, _ = doubled()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        pairs = [(model[0][1], model[2][0], 1), (model[2][1], model[3][0], 1), (model[3][1], model[6], 4)]
        for norm, reader, places in pairs:
            factors = (torch.rand(norm.num_features // 2, generator=generator) * 4 + 0.1).repeat_interleave(2)
            norm.weight *= factors
            norm.bias *= factors
            reader.weight /= factors.repeat_interleave(places).view(1, -1, *[1] * (reader.weight.dim() - 2))
    images = calibration()

    def difference_repaired(**rules: object) -> float:
        small, plan = slim(model, images.example, ratio=0.5, exclude=("7",), **rules)
        repaired, _ = repair(model, small, plan, images)
        return difference(model, repaired)

    assert difference_repaired(score="reconstruction", calibration=images) < 0.5 * difference_repaired()


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("name", ["chain", "catenated", "residual", "gated", "shuffling", "resized"])
def test_every_kind_of_network_can_be_scored_and_cut(name, coupling):
    torch.manual_seed(0)
    model = scramble(NETS[name]()).eval()
    images = calibration(32, side=32)
    called_twice = pytest.warns(UserWarning, match=r"leaves out what channels are worth to 'b\.0'")
    with called_twice if name == "shuffling" else nullcontext():
        small, plan = slim(model, EXAMPLE, ratio=0.3, coupling=coupling, score="reconstruction", calibration=images)
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-10
    assert "share lost" in plan.report()


def test_to_a_layer_that_is_too_wide_to_be_solved_a_channel_is_worth_all_that_it_gives(monkeypatch):
    model = net()
    images, labels = images_and_labels(64, 4)
    monkeypatch.setattr(foresight, "WIDEST", 6)
    model.train()
    with pytest.warns(UserWarning, match="the score reconstruction does not solve '3'"):
        scores = scores_of(model, Calibration.of(images, labels))["1"]
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        before = model[:3](images).double().movedim(1, -1).flatten(0, -2)
    scale = model[4].weight.double() / (model[4].running_var.double() + model[4].eps).sqrt()
    weight = (model[3].weight.flatten(1).double() * scale[:, None]).detach()
    whole = (before @ weight.T).var(0, unbiased=False).sum()
    alone = [float((before[:, [c]] @ weight[:, [c]].T).var(0, unbiased=False).sum() / whole) for c in range(7)]
    assert scores.tolist() == pytest.approx(alone, rel=1e-5)


def test_a_reader_that_cannot_be_solved_is_said_to_be_left_out():
    torch.manual_seed(0)
    model = scramble(Odd()).eval()
    with pytest.warns(UserWarning, match="leaves out what channels are worth to 'again': they are no Conv2d or Linear"):
        scores_of(model, calibration(32))


def test_the_memory_of_a_score_is_bounded_however_wide_a_layer_is():
    model, before = wide(), peak()
    with pytest.warns(UserWarning, match="the score reconstruction does not solve '5'"):
        scores = scores_of(model, calibration(32, side=9))["1"]
    assert peak() - before < 1 << 30
    assert len(set(scores.tolist())) > 400


def scores_on_ranks() -> dict[str, Tensor]:
    run = Runtime(EngineConfig(), 0)
    torch.manual_seed(0)
    model = scramble(chain(12, 10, 14)).eval()
    images = calibration(index=run.rank, ranks=run.world_size, sum_over_ranks=run.sum_over_ranks)
    scores = scores_of(model, images)
    foresight.WIDEST = 6
    with pytest.warns(UserWarning, match="does not solve '3'"):
        scores["to a wide layer"] = scores_of(net(), images)["1"]
    run.close()
    return scores


def test_two_ranks_score_as_one_does(tmp_path):
    (one,) = run_ranks(scores_on_ranks, 1, tmp_path)
    first, second = run_ranks(scores_on_ranks, 2, tmp_path)
    for name, want in one.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], want, rtol=1e-9)


def test_activations_that_are_not_finite_are_refused():
    model = net()
    with torch.no_grad():
        model[1].weight[2] = float("nan")
    with pytest.raises(ValueError, match="the activations at '3' are NaN or infinite"):
        scores_of(model)


def test_without_images_the_score_is_refused():
    with pytest.raises(ValueError, match="score reconstruction measures on images; give a calibration, or score by"):
        slim(net(), EXAMPLE, ratio=0.5, score="reconstruction")


def samples(count: int) -> tuple[Rows, Moments]:
    """Four features, three outputs that now are 0; targets are linear in the features where they are not below 0."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(1, count, 4, generator=generator)
    linear = x @ torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) + 0.3
    target = torch.where(linear > 0, linear, -(linear**2) - torch.rand(linear.shape, generator=generator))
    moments = Moments.none(1, 4, 3, x.device)
    moments.add(x, target)
    return Rows(x, torch.zeros_like(target), target), moments


def after_relu(line: Line, rows: Rows) -> float:
    output = rows.x.double() @ line.weight.mT + line.constant[:, None]
    return float((output.relu() - rows.target.double().relu()).square().mean())


def test_before_a_relu_the_refined_fit_is_nearer_than_that_of_least_squares():
    (fit, moments), (held, held_moments) = samples(4000), samples(500)
    line = solve(moments, held_moments, has_constant=True)
    hinge = Hinge.of(None, 1, 3, fit.x.device)
    refined = refine(line, [fit], [held], hinge, lambda values: values, has_constant=True)
    assert after_relu(refined, held) < 0.01 * after_relu(line, held)


def test_a_refined_fit_that_is_no_nearer_is_not_taken():
    (fit, moments), (held, held_moments) = samples(4000), samples(500)
    line = solve(moments, held_moments, has_constant=True)
    hinge = Hinge.of(None, 1, 3, fit.x.device)
    perfect = Rows(held.x, held.output, held.x @ line.weight.mT.float() + line.constant[:, None].float())
    assert refine(line, [fit], [perfect], hinge, lambda values: values, has_constant=True) is line


def test_the_side_that_a_relu_makes_zero_is_found_through_the_batchnorm():
    torch.manual_seed(0)
    norm = scramble(nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        norm.weight[::2] *= -1
        norm.weight[1] = 0
    hinge = Hinge.of(norm, 1, 6, norm.weight.device)
    outputs = torch.randn(1, 50, 6)
    with torch.no_grad():
        is_zero = norm(outputs[0, :, :, None, None]).flatten(1) < 0
    found = (hinge.side * (outputs - hinge.at) < 0)[0]
    assert torch.equal(found[:, [0, 2, 3, 4, 5]], is_zero[:, [0, 2, 3, 4, 5]])
    assert not found[:, 1].any()
    lack = hinge.lack(outputs, outputs.flip(1))
    both = (hinge.side * (outputs - hinge.at) < 0) & (hinge.side * (outputs.flip(1) - hinge.at) < 0)
    assert not lack[both].any()
    assert torch.equal(lack[~found[None]], (outputs - outputs.flip(1))[~found[None]].double())
