"""Every gamma by itself: exactly the smallest go, and the layers that make it possible behave like any other."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from test_prune_nets import EXAMPLE, NETS, Residual, block, chain, scramble
from torch import Tensor, nn

from netslim.prune import Plan, embed, largest_difference, load, make_plan, map_channels, save, slim
from netslim.prune.cut.select import ScatterChannels, SelectChannels


class PreActivated(nn.Module):
    """BatchNorms read a growing stack of channels before every convolution, as in a densely connected network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (6, 10, 14))
        self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for width in (6, 10))
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.head(torch.relu(self.norms[2](x)).mean((2, 3)))


ALL = {**NETS, "preactivated": PreActivated}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_every_network_is_cut_exactly_gamma_by_gamma(name, ratio):
    torch.manual_seed(0)
    model = scramble(ALL[name]()).eval()
    small, plan = slim(model, EXAMPLE, ratio=ratio, coupling="select")
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-10
    assert plan.num_removed == plan.num_asked


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("coupling", ["group", "select"])
def test_a_cut_network_in_its_old_shapes_computes_the_same_and_loses_the_same_channels_first(name, coupling):
    torch.manual_seed(0)
    model = scramble(ALL[name]()).eval()
    small, plan = slim(model, EXAMPLE, ratio=0.3, coupling=coupling)
    scramble(small)  # as training would
    whole = embed(model, small, plan)
    assert largest_difference(whole, small, plan, EXAMPLE) < 1e-10
    with torch.no_grad():
        images = torch.randn(2, 3, *EXAMPLE.shape[2:], dtype=torch.float64)
        assert torch.allclose(whole.double().eval()(images), small.double().eval()(images), atol=1e-10)
    _, more = slim(whole, EXAMPLE.double(), ratio=0.4, coupling=coupling)
    assert all(set(more.kept[key]) <= set(kept) for key, kept in plan.kept.items())


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["preactivated", "residual", "mobilenet_v2"])
def test_the_removed_set_is_the_exact_smallest_set(name, ratio):
    model = scramble(ALL[name]())
    channels = map_channels(model, EXAMPLE)
    gammas = channels.named_gammas(model, "select")
    plan = make_plan(gammas, channels, ratio=ratio, coupling="select")
    sizes = [(abs(value), name, i) for name, gamma in gammas.items() for i, value in enumerate(gamma.tolist())]
    smallest = {(name, index) for _, name, index in sorted(sizes)[: int(ratio * len(sizes))]}
    removed = {(x.name, i) for x in plan.layers for i in set(range(x.width)) - set(x.kept)}
    assert removed == smallest or any(plan.spared)


def test_on_chains_both_couplings_are_one():
    model = scramble(chain(12, 10, 14))
    channels = map_channels(model, EXAMPLE)
    group, select = (
        make_plan(channels.named_gammas(model, c), channels, ratio=0.5, coupling=c) for c in ("group", "select")
    )
    assert (group.layers, group.slices) == (select.layers, select.slices)
    assert not (*group.selections, *select.selections)


def test_a_producer_of_a_removed_gamma_goes_though_its_stream_stays():
    model = scramble(Residual())
    with torch.no_grad():
        model.outer[1].weight[:3] = 0
    small, plan = slim(model, EXAMPLE, ratio=0.11, coupling="select")
    assert [(around.name, around.before, around.after) for around in plan.selections] == [
        ("outer.1", None, (3, 4, 5, 6, 7))
    ]
    assert small.outer[0].out_channels == 5
    assert isinstance(small.outer[1].scatter, ScatterChannels)


def test_a_shared_channel_is_selected_before_its_batchnorm():
    model = scramble(PreActivated())
    with torch.no_grad():
        model.norms[1].weight[:2] = 0
    small, plan = slim(model, EXAMPLE, ratio=0.067, coupling="select")
    assert [(around.name, around.before, around.after) for around in plan.selections] == [
        ("norms.1", tuple(range(2, 10)), None)
    ]
    assert small.stem.out_channels == 6
    assert small.convs[1].in_channels == 8


def test_a_channel_that_all_its_batchnorms_lose_is_cut_at_its_producer():
    model = scramble(PreActivated())
    with torch.no_grad():
        for norm in model.norms:
            norm.weight[0] = 0
    small, plan = slim(model, EXAMPLE, ratio=0.1, coupling="select")
    assert small.stem.out_channels == 5
    assert not plan.selections


@pytest.mark.parametrize("name", ["residual", "preactivated"])
def test_a_network_with_selections_is_like_any_other(name, tmp_path):
    model = scramble(ALL[name]()).eval()
    small, plan = slim(model, EXAMPLE, ratio=0.5, coupling="select")
    assert plan.selections
    want = small(EXAMPLE)
    assert Plan.from_json(plan.to_json()) == plan
    assert torch.equal(pickle.loads(pickle.dumps(small))(EXAMPLE), want)
    assert torch.equal(copy.deepcopy(small)(EXAMPLE), want)
    save(small, plan, tmp_path)
    assert torch.equal(load(tmp_path, ALL[name]).eval()(EXAMPLE), want)
    exported = torch.export.export(small, (EXAMPLE,)).module()
    assert torch.allclose(exported(EXAMPLE), want)
    small.train()(EXAMPLE).square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_the_selecting_layers_can_be_scripted():
    x = torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings():  # torch.jit is deprecated, but still in use
        warnings.simplefilter("ignore")
        for layer in (SelectChannels([0, 2]), ScatterChannels([1, 2, 4], 5)):
            buffer = io.BytesIO()
            torch.jit.save(torch.jit.script(layer), buffer)
            buffer.seek(0)
            assert torch.equal(torch.jit.load(buffer)(x), layer(x))


def test_scattering_puts_zeros_between_and_selecting_takes_them_out():
    x = torch.randn(2, 3, 4)
    spread = ScatterChannels([1, 2, 4], 5)(x)
    assert spread[:, [0, 3]].eq(0).all()
    assert torch.equal(SelectChannels([1, 2, 4])(spread), x)


def test_selections_are_in_no_state_dict():
    small, _ = slim(scramble(Residual()), EXAMPLE, ratio=0.5, coupling="select")
    assert not [key for key in small.state_dict() if "scatter" in key or "select" in key]


def test_outputs_of_the_network_lose_gammas_but_no_channels():
    model = scramble(nn.Sequential(block(3, 8), block(8, 5)))
    small, _ = slim(model, EXAMPLE, ratio=0.5, coupling="select")
    assert small(EXAMPLE).shape[1] == 5


def test_a_batchnorm_under_two_names_is_replaced_under_both():
    model = scramble(Residual())
    model.also = nn.ModuleList([model.outer[1]])
    small, _ = slim(model, EXAMPLE, ratio=0.5, coupling="select")
    assert small.also[0] is small.outer[1]
