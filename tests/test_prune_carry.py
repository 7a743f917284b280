"""The optimizer goes on where it was: the cut network's next steps are the masked network's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_prune_nets import EXAMPLE, Residual, scramble

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


def test_an_optimizer_of_another_network_is_refused():
    model, _, plan = trained(OPTIMIZERS["sgd"], "group")
    other = torch.optim.SGD(Residual().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer holds a parameter of shape .* that is not the model's"):
        carry(other, model, cut(model, plan), plan)
