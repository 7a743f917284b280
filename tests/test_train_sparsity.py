"""The penalty on gammas against arithmetic by hand."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from netslim.train import GammaPenalty, describe_pull, gamma_summary, soft_threshold_
from netslim.train.ranks import whole
from netslim.train.sparsity import BetaFade

LAMBDA = 0.25


def two_gammas() -> nn.Parameter:
    return nn.Parameter(torch.tensor([0.5, -0.5, 0.0]))


def test_the_subgradient_adds_lambda_times_the_sign_to_the_gradient() -> None:
    gamma = two_gammas()
    optimizer = torch.optim.SGD([gamma], lr=1.0)
    GammaPenalty([gamma], LAMBDA).attach(optimizer)
    gamma.grad = torch.tensor([0.125, 0.125, 0.125])
    optimizer.step()
    assert gamma.tolist() == [0.5 - 0.375, -0.5 + 0.125, -0.125]


def test_twenty_steps_with_momentum_and_decay_equal_the_hand_computed_ones() -> None:
    gamma = two_gammas()
    optimizer = torch.optim.SGD([gamma], lr=0.1, momentum=0.9, weight_decay=0.01)
    GammaPenalty([gamma], LAMBDA).attach(optimizer)
    expected, velocity = gamma.detach().double(), torch.zeros(3, dtype=torch.float64)
    for step in range(20):
        loss_gradient = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64) * (step + 1)
        gamma.grad = loss_gradient.float()
        optimizer.step()
        velocity = 0.9 * velocity + loss_gradient + LAMBDA * expected.sign() + 0.01 * expected
        expected = expected - 0.1 * velocity
    torch.testing.assert_close(gamma.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_leaves_the_penalty_whole(fused: bool) -> None:
    gamma = two_gammas()
    optimizer = torch.optim.SGD([gamma], lr=1.0, fused=fused)
    GammaPenalty([gamma], LAMBDA).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(gamma.sum() * 0.125).backward()
    scaler.step(optimizer)
    assert gamma.tolist() == [0.5 - 0.375, -0.5 + 0.125, -0.125]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["subgradient", "proximal"])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool, method: str) -> None:
    gamma = two_gammas()
    optimizer = torch.optim.SGD([gamma], lr=1.0, fused=fused)
    GammaPenalty([gamma], LAMBDA, method).attach(optimizer)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(gamma.sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert gamma.tolist() == [0.5, -0.5, 0.0]


def test_accumulated_backward_passes_are_penalised_once() -> None:
    gamma = two_gammas()
    optimizer = torch.optim.SGD([gamma], lr=1.0)
    GammaPenalty([gamma], LAMBDA).attach(optimizer)
    for _ in range(4):
        (gamma.sum() * 0.125 / 4).backward()
    optimizer.step()
    assert gamma.tolist() == [0.5 - 0.375, -0.5 + 0.125, -0.125]


def test_clipping_the_gradient_does_not_clip_the_penalty() -> None:
    gamma = two_gammas()
    optimizer = torch.optim.SGD([gamma], lr=1.0)
    GammaPenalty([gamma], LAMBDA).attach(optimizer)
    gamma.grad = torch.tensor([8.0, 0.0, 0.0])
    torch.nn.utils.clip_grad_norm_([gamma], max_norm=0.125)
    optimizer.step()
    torch.testing.assert_close(gamma, torch.tensor([0.125, -0.25, 0.0]))


def test_the_proximal_step_moves_towards_zero_as_far_as_momentum_carries_a_gradient_of_lambda() -> None:
    gamma = nn.Parameter(torch.tensor([0.5, -0.5, 0.01]))
    optimizer = torch.optim.SGD([gamma], lr=0.1, momentum=0.5)
    GammaPenalty([gamma], LAMBDA, "proximal").attach(optimizer)
    gamma.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(gamma.detach(), torch.tensor([0.45, -0.45, 0.0]))
    assert gamma[2].item() == 0.0


@pytest.mark.parametrize("method", ["subgradient", "proximal"])
def test_both_methods_settle_where_the_gradient_of_the_loss_balances_lambda(method: str) -> None:
    # loss (gamma - 1)^2 / 2 + lambda |gamma| has its minimum at 1 - lambda
    gamma = nn.Parameter(torch.tensor([0.5]))
    optimizer = torch.optim.SGD([gamma], lr=0.05, momentum=0.9)
    GammaPenalty([gamma], LAMBDA, method).attach(optimizer)  # type: ignore[arg-type]
    for _ in range(600):
        optimizer.zero_grad()
        ((gamma - 1) ** 2 / 2).sum().backward()
        optimizer.step()
    assert gamma.item() == pytest.approx(1 - LAMBDA, abs=1e-4)


def test_soft_threshold_gives_true_zeros() -> None:
    values = [torch.tensor([0.3, -0.3, 0.1, -0.1, 0.0])]
    soft_threshold_(values, 0.2)
    torch.testing.assert_close(values[0], torch.tensor([0.1, -0.1, 0.0, 0.0, 0.0]))


def test_the_gammas_of_a_model_are_found_by_type() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False))
    assert [gamma.data_ptr() for gamma in GammaPenalty(model, 0.1).gammas] == [model[1].weight.data_ptr()]


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable BatchNorm scale"):
        GammaPenalty(nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize("weight", [-1e-4, float("nan")])
def test_a_lambda_below_zero_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        GammaPenalty([two_gammas()], weight)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="does not hold all penalised gammas"):
        GammaPenalty([two_gammas()], 0.1).attach(torch.optim.SGD([two_gammas()], lr=0.1))


def test_a_detached_penalty_no_longer_acts() -> None:
    gamma = two_gammas()
    optimizer = torch.optim.SGD([gamma], lr=1.0)
    GammaPenalty([gamma], LAMBDA).attach(optimizer).detach()
    gamma.grad = torch.zeros(3)
    optimizer.step()
    assert gamma.tolist() == [0.5, -0.5, 0.0]


def chain_and_optimizer(method: str) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Two BatchNorms whose gammas are 1, penalised by an optimizer that has momentum from a first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    GammaPenalty(model, 0.1, method).attach(optimizer)  # type: ignore[arg-type]
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 3, 4, 4)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("method", ["subgradient", "proximal"])
@pytest.mark.parametrize("num_before", [0, 2])
def test_a_gamma_that_is_frozen_after_the_penalty_was_attached_stays(method: str, num_before: int) -> None:
    model, optimizer = chain_and_optimizer(method)
    for _ in range(num_before):
        step(model, optimizer)
    model[1].requires_grad_(False)
    before, other = model[1].weight.clone(), model[3].weight.clone()
    step(model, optimizer)
    assert torch.equal(model[1].weight, before)
    assert model[1].weight.grad is None
    assert not torch.equal(model[3].weight, other)
    model[1].requires_grad_(True)
    step(model, optimizer)
    assert not torch.equal(model[1].weight, before)


@pytest.mark.parametrize("method", ["subgradient", "proximal"])
def test_a_gamma_without_a_gradient_gets_none(method: str) -> None:
    model, optimizer = chain_and_optimizer(method)
    optimizer.zero_grad()
    model[2:](torch.randn(8, 4, 4, 4)).square().mean().backward()  # the first two layers are not called
    optimizer.step()
    assert model[1].weight.grad is None
    assert model[1].weight.tolist() == [1.0] * 4
    assert model[3].weight.max() < 1.0


def test_gammas_that_are_frozen_from_the_beginning_are_penalised_once_they_are_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GammaPenalty(model, 0.5).attach(optimizer)
    step(model, optimizer)
    assert model[1].weight.tolist() == [1.0] * 4
    model[1].requires_grad_(True)
    optimizer.zero_grad()
    model[1].weight.grad = torch.zeros(4)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), torch.full((4,), 1 - 0.1 * 0.5))


def test_a_model_whose_gammas_are_all_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable BatchNorm scale"):
        GammaPenalty(nn.BatchNorm2d(4).requires_grad_(False), 0.1)


def test_the_beta_of_a_channel_at_zero_fades_and_a_frozen_one_stays() -> None:
    norms = [nn.BatchNorm2d(2), nn.BatchNorm2d(2)]
    for norm in norms:
        nn.init.zeros_(norm.weight)
        nn.init.ones_(norm.bias)
    optimizer = torch.optim.SGD([parameter for norm in norms for parameter in norm.parameters()], lr=0.1)
    BetaFade(0.5).attach(optimizer, [(whole(norm.bias), norm.weight) for norm in norms])
    for norm in norms:
        norm.bias.grad = torch.zeros(2)
    norms[1].bias.requires_grad_(False)
    optimizer.step()
    torch.testing.assert_close(norms[0].bias.detach(), torch.full((2,), 1 - 0.1 * 0.5))
    assert norms[1].bias.tolist() == [1.0, 1.0]


def test_frozen_gammas_do_not_count_in_the_pull() -> None:
    frozen, trained = nn.Parameter(torch.ones(8), requires_grad=False), nn.Parameter(torch.full((4,), 0.25))
    line, _ = describe_pull([frozen, trained], weight=1e-3, travel=1000.0)
    assert "median |gamma| 0.25" in line


def test_a_pull_below_the_median_gamma_is_a_warning_that_names_a_lambda() -> None:
    line, is_warning = describe_pull([torch.full((8,), 0.5)], weight=1e-5, travel=1000.0)
    assert is_warning
    assert "pull 0.01" in line
    assert "0.0005 is the least lambda that can" in line


def test_a_pull_beyond_the_median_gamma_is_no_warning() -> None:
    line, is_warning = describe_pull([torch.full((8,), 0.5)], weight=1e-3, travel=1000.0)
    assert not is_warning
    assert "median |gamma| 0.5" in line


def test_the_summary_counts_small_gammas_over_all_layers() -> None:
    summary = gamma_summary([torch.tensor([0.5, -0.005]), torch.tensor([0.0005, -0.7])])
    assert summary["gamma_below_1e-2"] == 0.5
    assert summary["gamma_below_1e-3"] == 0.25


@pytest.mark.parametrize("method", ["subgradient", "proximal"])
def test_a_second_penalty_on_the_same_gammas_is_refused_until_the_first_is_detached(method: str) -> None:
    """As where a notebook's cell is run again."""
    gamma, other = two_gammas(), two_gammas()
    optimizer = torch.optim.SGD([gamma, other], lr=1.0)
    first = GammaPenalty([gamma], LAMBDA, method).attach(optimizer)  # type: ignore[arg-type]
    GammaPenalty([other], LAMBDA).attach(optimizer)
    with pytest.raises(ValueError, match="penalises these gammas already"):
        GammaPenalty([gamma], LAMBDA).attach(optimizer)
    first.detach()
    GammaPenalty([gamma], LAMBDA).attach(optimizer)


def test_a_penalty_attached_to_the_optimizer_that_accelerate_gave_acts_once_a_step() -> None:
    for state in (AcceleratorState, GradientState):  # of tests before
        state._reset_state()
    model = nn.BatchNorm1d(3)
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    GammaPenalty(model, LAMBDA).attach(optimizer)
    model.weight.grad = torch.zeros(3)
    optimizer.step()
    assert model.weight.tolist() == [0.75, 0.75, 0.75]
