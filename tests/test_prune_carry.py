"""The optimizer goes on where it was: the cut network's next steps are the masked network's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_prune_nets import EXAMPLE, Residual, scramble
from torch.optim import lr_scheduler

from netslim.prune import carry, make_plan, map_channels, masked
from netslim.prune.cut.surgery import cut
from netslim.train import GammaPenalty

TARGETS = torch.tensor([1, 2])


def trained(make, coupling):
    model = scramble(Residual()).double().eval()
    optimizer = make(model.parameters())
    for _ in range(3):
        F.cross_entropy(model(EXAMPLE.double()), TARGETS).backward()
        optimizer.step()
        optimizer.zero_grad()
    channels = map_channels(model, EXAMPLE.double(), coupling)
    plan = make_plan(channels.named_gammas(model, coupling), channels, ratio=0.4, coupling=coupling)
    return model, optimizer, plan


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


@pytest.mark.parametrize("coupling", ["group", "select"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kept_weight_has_its_own_momentum(name, coupling):
    model, optimizer, plan = trained(OPTIMIZERS[name], coupling)
    small = cut(model, plan)
    carried = carry(optimizer, model, small, plan)
    # a momentum as large as the weight it belongs to: then it has to be sliced as the weight is
    held = {id(p) for group in carried.param_groups for p in group["params"]}
    assert held == {id(p) for p in small.parameters()}
    for old, new in zip(optimizer.param_groups[0]["params"], carried.param_groups[0]["params"], strict=True):
        with torch.no_grad():
            for key, value in optimizer.state[old].items():
                if value.shape == old.shape:
                    value.copy_(old)
                    assert carried.state[new][key].shape == new.shape
    again = carry(optimizer, model, small, plan)
    for new in again.param_groups[0]["params"]:
        for key, value in again.state[new].items():
            if key != "step":
                assert torch.equal(value, new), key
    assert [{k: v for k, v in g.items() if k != "params"} for g in again.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]


def test_the_next_step_of_kept_weights_is_that_of_the_masked_network():
    model, optimizer, plan = trained(OPTIMIZERS["sgd"], "group")
    small = cut(model, plan)
    carried = carry(optimizer, model, small, plan)
    twin = masked(model, plan)
    twin_optimizer = copy.deepcopy(
        optimizer, {id(a): b for a, b in zip(model.parameters(), twin.parameters(), strict=True)}
    )
    for network, its in ((small, carried), (twin, twin_optimizer)):
        F.cross_entropy(network(EXAMPLE.double()), TARGETS).backward()
        its.step()
    kept = torch.tensor(plan.kept["inner.1"])
    have, want = small.inner[1].weight, twin.inner[1].weight[kept]
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)
    assert not torch.equal(want, model.inner[1].weight[kept])


def test_the_old_optimizer_and_its_hooks_stay_where_they_were():
    model, optimizer, plan = trained(OPTIMIZERS["sgd"], "group")
    GammaPenalty(model, weight=0.1).attach(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    carried = carry(optimizer, model, cut(model, plan), plan)
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        assert torch.equal(state["momentum_buffer"], after["state"][key]["momentum_buffer"])
    assert not carried._optimizer_step_pre_hooks


def rates(optimizer, scheduler, count=8):
    """The learning rates of the next steps."""
    found = []
    for _ in range(count):
        optimizer.step()
        scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def chained(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "sequential": chained,
}


@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_is_carried_gives_the_new_optimizer_the_rates_that_the_old_would_have_had(name, num_before):
    model, optimizer, plan = trained(OPTIMIZERS["sgd"], "group")
    scheduler = SCHEDULERS[name](optimizer)
    rates(optimizer, scheduler, num_before)
    before = [group["lr"] for group in optimizer.param_groups], scheduler.last_epoch
    small = cut(model, plan)
    carried, new = carry(optimizer, model, small, plan, scheduler)
    assert new.optimizer is carried
    have = rates(carried, new)
    assert ([group["lr"] for group in optimizer.param_groups], scheduler.last_epoch) == before
    assert scheduler.optimizer is optimizer
    assert have == rates(optimizer, scheduler)
    assert len({tuple(each) for each in have}) > 1


def test_a_scheduler_that_stays_with_the_old_optimizer_is_said():
    model, optimizer, plan = trained(OPTIMIZERS["sgd"], "group")
    small = cut(model, plan)
    carry(optimizer, model, small, plan)  # warnings are errors
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    with pytest.warns(UserWarning, match=r"will not step the one that comes back; carry it too, by carry\(\.\.\., sch"):
        carry(optimizer, model, small, plan)
    other = torch.optim.SGD(small.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the scheduler steps another optimizer"):
        carry(other, small, small, plan, scheduler)


def test_a_penalty_acts_again_once_it_is_attached_to_the_carried_optimizer():
    model, optimizer, plan = trained(OPTIMIZERS["sgd"], "group")
    GammaPenalty(model, weight=0.1).attach(optimizer)
    small = cut(model, plan)
    gammas = [module.weight for module in small.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    moved = []
    for attach in (False, True):
        carried = carry(optimizer, model, small, plan)
        if attach:
            GammaPenalty(small, weight=0.1).attach(carried)
        before = gammas[0].detach().clone()
        for parameter in small.parameters():
            parameter.grad = torch.zeros_like(parameter)
        carried.step()
        moved.append(gammas[0].detach() - before)
        with torch.no_grad():
            gammas[0].copy_(before)
    assert torch.allclose(moved[1] - moved[0], -0.01 * 0.1 * (1 + 0.9) * before.sign())  # lr, lambda, Nesterov


def test_an_optimizer_of_another_network_is_refused():
    model, _, plan = trained(OPTIMIZERS["sgd"], "group")
    other = torch.optim.SGD(Residual().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer holds a parameter of shape .* that is not the model's"):
        carry(other, model, cut(model, plan), plan)


def test_state_that_is_not_shaped_as_its_parameter_is_refused_where_that_is_cut():
    model, optimizer, plan = trained(torch.optim.Adafactor, "group")
    with pytest.raises(ValueError, match=r"the optimizer's \w+ of '.*' is \(.*\), which the cut does not say"):
        carry(optimizer, model, cut(model, plan), plan)
