"""The cut network is the one that the plan says, and in all else the one that it was."""

import copy
import pickle

import pytest
import torch
from test_prune_nets import EXAMPLE, Residual, chain, scramble
from torch import nn

from netslim.prune import cut, largest_difference, make_plan, map_channels, masked, prove, slim
from netslim.prune import slimming as slimming_module


def net() -> nn.Module:
    torch.manual_seed(0)
    return scramble(chain(12, 10, 14))


def plan_for(model, ratio=0.5):
    channels = map_channels(model, EXAMPLE)
    return make_plan(channels.named_gammas(model), channels, ratio=ratio)


def test_layers_have_exactly_the_planned_widths():
    model = net()
    plan = plan_for(model)
    small = cut(model, plan)
    widths = {name: small.get_submodule(name).num_features for name in plan.kept}
    assert widths == {name: len(kept) for name, kept in plan.kept.items()}


def test_the_layers_attributes_say_their_new_sizes():
    small, plan = slim(net(), EXAMPLE, ratio=0.5)
    assert small[0][0].out_channels == small[0][0].weight.shape[0] == small[2][0].in_channels == len(plan.kept["0.1"])
    assert small[6].in_features == small[6].weight.shape[1] == 4 * len(plan.kept["3.1"])


def test_ratio_zero_changes_no_bit():
    model = net()
    small, _ = slim(model, EXAMPLE, ratio=0)
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(EXAMPLE), small.eval()(EXAMPLE))


def test_the_original_is_unchanged():
    model = net()
    before = copy.deepcopy(model.state_dict())
    slim(model, EXAMPLE, ratio=0.5)
    assert model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_cut_network_shares_no_memory_with_the_original():
    model = net()
    plan = plan_for(model)
    small = cut(model, plan)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    assert all(module.weight.abs().sum() > 0 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_the_cut_network_trains():
    small, _ = slim(net(), EXAMPLE, ratio=0.5)
    small.train()(EXAMPLE).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


def test_the_cut_network_can_be_pickled_and_copied():
    small, _ = slim(net().eval(), EXAMPLE, ratio=0.5)
    want = small(EXAMPLE)
    assert torch.equal(pickle.loads(pickle.dumps(small))(EXAMPLE), want)
    assert torch.equal(copy.deepcopy(small)(EXAMPLE), want)


def test_channels_last_is_kept():
    model = net().to(memory_format=torch.channels_last)
    small, _ = slim(model, EXAMPLE, ratio=0.5)
    convolutions = [module for module in small.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    assert not convolutions[0].weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_kept(dtype):
    small, _ = slim(net().to(dtype), EXAMPLE.to(dtype), ratio=0.5)
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_training_flags_and_requires_grad_are_kept():
    model = net()
    model[0].eval()
    model[2].requires_grad_(False)
    small, _ = slim(model, EXAMPLE, ratio=0.5)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_transposed_convolutions_are_cut_exactly():
    def up(num_in, num_out):
        return [nn.ConvTranspose2d(num_in, num_out, 2, stride=2), nn.BatchNorm2d(num_out), nn.SiLU()]

    torch.manual_seed(0)
    model = scramble(nn.Sequential(*up(3, 8), *up(8, 6), nn.ConvTranspose2d(6, 2, 1)))
    small, plan = slim(model, EXAMPLE[:, :, :8, :8], ratio=0.5)
    assert small[3].weight.shape[:2] == (len(plan.kept["1"]), len(plan.kept["4"]))


def test_masking_zeroes_the_gamma_and_beta_of_the_removed_channels_only():
    model = net()
    plan = plan_for(model)
    norm, kept = masked(model, plan)[0][1], list(plan.kept["0.1"])
    assert norm.weight.nonzero().flatten().tolist() == norm.bias.nonzero().flatten().tolist() == kept
    assert torch.equal(norm.weight[kept], model[0][1].weight[kept])


def test_a_plan_of_a_wider_network_is_refused_naming_the_layer():
    with pytest.raises(ValueError, match=r"'0.1' has 13 channels, the plan says 12"):
        cut(chain(13, 10, 14), plan_for(net()))


def test_a_plan_of_another_network_is_refused_naming_the_layer():
    with pytest.raises(ValueError, match=r"it has no BatchNorm '0.1'"):
        cut(Residual(), plan_for(net()))


def test_a_wrong_cut_is_noticed():
    model = net()
    plan = plan_for(model)
    small = cut(model, plan)
    with torch.no_grad():
        small[0][1].weight[0] += 0.1
    assert largest_difference(model, small, plan, EXAMPLE) > 1e-5


def test_infinite_logits_prove_nothing():
    model = net()
    with torch.no_grad():
        model[-1].bias[0] = torch.inf
    plan = plan_for(model)
    assert largest_difference(model, cut(model, plan), plan, EXAMPLE) == torch.inf
    with pytest.raises(ValueError, match="the network's outputs are NaN or infinite"):
        prove(model, cut(model, plan), plan, EXAMPLE)


def test_slim_returns_nothing_where_the_proof_fails(monkeypatch):
    monkeypatch.setattr(slimming_module, "cut", lambda model, plan: copy.deepcopy(model))
    with pytest.raises(RuntimeError, match="differs from the masked one by"):
        slim(net(), EXAMPLE, ratio=0.5)
