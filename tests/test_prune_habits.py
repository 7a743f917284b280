"""What networks do around their channels, as people write them: counts, caches, closures, decisions, shared tensors."""

import collections
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_prune_nets import block, scramble
from test_prune_record import script
from torch import Tensor, nn

from netslim import prune
from netslim.prune import ChannelMap, cut, largest_difference, make_plan, map_channels, slim

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A block, a function, a block, and a head."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.head, self.function = block(3, 8), block(8, 6), nn.Linear(6, 5), function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.function(self.a(x))).mean((2, 3)))


def free(model: nn.Module, example: Any = EXAMPLE) -> dict[str, int]:
    """Count what is prunable per BatchNorm, and cut half of it exactly under both couplings."""
    scramble(model)
    for coupling in ("group", "select"):
        channels = map_channels(model, example, coupling)
        plan = make_plan(channels.named_gammas(model, coupling), channels, ratio=0.5, coupling=coupling)
        assert largest_difference(model, cut(model, plan), plan, example) < 1e-9
    return found(map_channels(model, example))


def found(channels: ChannelMap) -> dict[str, int]:
    return {layer.name: layer.num_prunable for layer in channels.layers}


COUNTED = {
    "root": lambda x: x * x.shape[1] ** -0.5,
    "square root": lambda x: x / math.sqrt(x.shape[1]),
    "ratio": lambda x: x * (x.shape[1] / 8),
    "rest": lambda x: x if x.shape[1] % 3 else x * 2,
    "bits": lambda x: x if x.shape[1] & 8 else x * 2,
    "sum": lambda x: x if x.shape[1] + 1 == 9 else x * 2,
    "less": lambda x: x if x.shape[1] > 5 else x * 2,
    "whole number": lambda x: x * int(x.shape[1]),
    "elements": lambda x: x * (x.numel() / 1000),
    "arange": lambda x: x * torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1),
    "fill": lambda x: x * torch.full((1, 1, 1, 1), float(x.shape[1]), device=x.device),
    "padded to a width": lambda x: F.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1])),
    "looked up": lambda x: x * {8: 0.5}[x.shape[1]],
    "groups": lambda x: F.group_norm(x, x.shape[1] // 2),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_number_of_channels_that_becomes_another_kind_of_number_holds_them(name):
    model = Between(COUNTED[name])
    assert free(model) == {"a.1": 0, "b.1": 6}
    ((reason, _),) = map_channels(model, EXAMPLE).layers[0].reasons
    assert "test_prune_habits.py:" in reason


def _put(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, :, 1:] = x[:, :, :-1]
    return made


def _masked(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0.1] = 0
    return x


def _attended(x: Tensor) -> Tensor:
    """Let two halves of the channels compete, pair by pair, as in split attention and selective kernels."""
    paths = x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
    shares = (paths.sum(1, keepdim=True) + paths).mean((3, 4), keepdim=True).softmax(1)
    return (torch.stack([paths[:, 0], paths[:, 1]], 1) * shares).sum(1).repeat(1, 2, 1, 1)


SHRINKING = {
    "halves": lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "narrow": lambda x: torch.cat([x, x.narrow(1, 0, x.shape[1] // 2)], 1)[:, : x.shape[1]],
    "elements": lambda x: x.view(2, x.numel() // 2).view(2, x.shape[1], 16, 16),
    "equal parts": lambda x: x.view(2, x.shape[1] // 4, 4, 16, 16).transpose(1, 2).reshape(x.shape) * 1.0,
    "difference": lambda x: F.pad(x, (0, 0, 0, 0, 0, x.shape[1] - x.relu().shape[1])),
    "divisor": lambda x: x / (1 + x.abs()),
    "type of another": lambda x: x * torch.ones(1, device=x.device).to(x),
    "put in": _put,
    "masked": _masked,
    "copied": lambda x: torch.empty_like(x).copy_(x),
    "paths that compete": _attended,
    "einsum of places": lambda x: torch.einsum("nchw, nchv -> nchwv", x, x.relu()).mean(4),
    "einsum over channels": lambda x: x * torch.einsum("nchw,nchw->nhw", x, x.tanh())[:, None],
    "einsum with a gate": lambda x: torch.einsum("nchw,nc->nchw", x, x.mean((2, 3)).sigmoid()),
    "weights one by one": lambda x: sum(x * weight for weight in torch.ones(3, device=x.device).unbind()),
    "printed": lambda x: x * len(f"{x.dtype} {x.sum()}"[:1]),
}


@pytest.mark.parametrize("name", SHRINKING)
def test_what_shrinks_with_its_channels_is_followed(name):
    assert sum(free(Between(SHRINKING[name])).values()) >= 12


def test_a_parameter_shrinks_with_the_channels_that_einsum_adds_up():
    class Own(Between):
        def __init__(self) -> None:
            super().__init__(lambda x: x * torch.einsum("nchw,c->nhw", x, self.scale)[:, None])
            self.scale = nn.Parameter(torch.rand(8))

    model = Own()
    assert free(model) == {"a.1": 8, "b.1": 6}
    small, _ = slim(model, EXAMPLE, ratio=0.5)
    assert len(small.scale) < 8


def test_a_network_that_writes_into_its_gate_leaves_no_trace_in_the_map_of_the_next():
    def gate(x: Tensor) -> Tensor:
        g = torch.sigmoid(x)
        g *= x
        return torch.mul(g, 2, out=torch.empty_like(g))

    class Shifted(Between):
        def __init__(self) -> None:
            super().__init__(lambda x: x + self.shift)
            self.shift = nn.Parameter(torch.rand(1, 8, 1, 1))

    map_channels(Between(gate), EXAMPLE)
    first, _ = map_channels(Shifted(), EXAMPLE).layers
    assert not first.num_prunable
    assert "'add' of a parameter at " in first.reasons[0][0]


def test_features_that_only_training_returns_stay():
    class Returning(Between):
        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            out = self.head(self.b(y).mean((2, 3)))
            return {"out": out, "features": y} if self.training else out

    assert found(map_channels(Returning(nn.ReLU()), EXAMPLE)) == {"a.1": 0, "b.1": 6}


def test_a_forward_put_around_another_one_runs_the_copys_layers():
    def doubled(module: nn.Module) -> None:
        old = module.forward
        module.forward = lambda x: old(x) * 2  # type: ignore[method-assign]

    model = scramble(Between(nn.ReLU())).train()
    doubled(model.b)
    before = model.b[1].running_mean.clone()
    small, plan = slim(model, EXAMPLE, ratio=0.5)
    assert torch.equal(model.b[1].running_mean, before)
    assert plan.num_removed == 7
    assert small.b.forward.__closure__[0].cell_contents.__self__ is small.b


def test_a_decision_that_a_module_hands_out_holds_what_its_caller_handles():
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> bool:
            return x.mean().item() > 0

    class Deciding(Between):
        def forward(self, x: Tensor) -> Tensor:
            gate, x = self.gate(x), self.a(x)
            return self.head(self.b(self.c(x) if gate else self.d(x)).mean((2, 3)))

    model = Deciding(nn.ReLU(), gate=Gate(), c=nn.Sequential(block(8, 7), block(7, 8)), d=block(8, 8))
    channels = found(map_channels(scramble(model), EXAMPLE))
    branches = {name: channels[name] for name in ("a.1", "c.0.1", "c.1.1", "d.1") if name in channels}
    assert {name for name, size in branches.items() if size} <= {"c.0.1"}


CACHE: dict[Any, Tensor] = {}
SEEN: collections.defaultdict[str, list[Tensor]] = collections.defaultdict(list)


@functools.lru_cache
def _ones(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


def test_caches_and_containers_of_the_users_are_as_they_were():
    class Caching(Between):
        SHARED: dict[str, Tensor] = {}  # noqa: RUF012  # that is the mistake which people make

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.SHARED.setdefault("first", x)
            ones = CACHE.setdefault(x.shape[2:], torch.ones(1, 1, *x.shape[2:], device=x.device))
            return self.head(self.b(x * ones * _ones(x.device)).mean((2, 3)))

    model, queue, nested = scramble(Caching(nn.ReLU())), collections.deque[Tensor](), {"x": list[Tensor]()}
    model.a.register_forward_hook(lambda module, args, result: SEEN["a"].append(result))
    model.b.register_forward_hook(lambda module, args, result, keep=queue: keep.append(result))
    model.b.register_forward_hook(lambda module, args, result: nested["x"].append(result))
    _, plan = slim(model, EXAMPLE, ratio=0.5)
    assert plan.num_removed == 7
    assert not CACHE
    assert not SEEN
    assert not queue
    assert not nested["x"]
    assert not Caching.SHARED
    model(EXAMPLE)
    assert CACHE
    CACHE.clear()
    SEEN.clear()


def test_noise_of_each_channel_is_the_same_to_the_proof():
    model = Between(lambda x: x * torch.rand(x.shape[0], x.shape[1], 1, 1, device=x.device, dtype=x.dtype))
    assert free(model) == {"a.1": 8, "b.1": 6}


@pytest.mark.parametrize("own", ["bias", "gamma", "statistics"])
def test_tensors_that_layers_share_in_part_hold_them(own):
    model = nn.Sequential(block(3, 8), block(8, 8), block(8, 8), nn.Conv2d(8, 4, 1))
    if own == "bias":
        model[0][0], model[1][0] = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        model[1][0].bias = model[0][0].bias
    elif own == "gamma":
        model[1][1].weight = model[0][1].weight
    else:
        model[1][1].running_mean = model[0][1].running_mean
    channels = free(model)
    assert channels["2.1"] == 8


def test_a_scripted_part_of_a_network_stays_and_the_rest_goes():
    model = nn.Sequential(block(3, 8), block(8, 8), script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())), block(8, 6))
    model.append(nn.Conv2d(6, 4, 1))
    channels = found(map_channels(scramble(model), EXAMPLE))
    assert channels["0.1"] == 8
    assert channels["1.1"] == 0
    assert channels["3.1"] == 6


def test_what_cannot_be_copied_is_the_same_for_both():
    model = scramble(Between(nn.ReLU()))
    model.lock = threading.Lock()
    _, plan = slim(model, EXAMPLE, ratio=0.5)
    assert plan.num_removed == 7


def test_outputs_in_objects_of_any_kind_are_compared():
    class Several(Between):
        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return {"features": y, "none": None, "out": self.head(self.b(y).mean((2, 3)))}.values()

    assert found(map_channels(Several(nn.ReLU()), EXAMPLE)) == {"a.1": 0, "b.1": 6}


def seen_of(model: nn.Module) -> list[Any]:
    """What a user may count on finding again: modes, what is trained, gradients, weights and statistics, hooks."""
    return [
        [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        {name: value.tolist() for name, value in model.state_dict().items()},
    ]


USES: dict[str, Callable[..., Any]] = {
    "map": lambda model, small, plan, images: map_channels(model, images.example),
    "slim": lambda model, small, plan, images: slim(model, images.example, ratio=0.4),
    "cut": lambda model, small, plan, images: cut(model, plan),
    "prove": lambda model, small, plan, images: prune.prove(model, small, plan, images.example),
    "masked": lambda model, small, plan, images: prune.masked(model, plan),
    "embed": lambda model, small, plan, images: prune.embed(model, small, plan),
    "repair": prune.repair,
    "score": lambda model, small, plan, images: slim(
        model, images.example, ratio=0.4, score="reconstruction", calibration=images
    ),
    "foreseen": lambda model, small, plan, images: prune.foreseen(model, images.example, 100),
    "cost": lambda model, small, plan, images: prune.cost(model, images.example),
    "latency": lambda model, small, plan, images: prune.latency(model, images.example[:1]),
    "folded": lambda model, small, plan, images: prune.folded(model, images.example),
}


@pytest.mark.parametrize("use", USES)
def test_no_function_changes_modes_gradients_or_what_is_trained_of_the_networks_that_it_is_given(use: str) -> None:
    torch.manual_seed(0)
    model = scramble(nn.Sequential(block(3, 8), block(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)))
    model[0].eval()
    model[1][1].weight.requires_grad_(False)
    images = prune.Calibration.of(torch.randn(64, 3, 16, 16), torch.randint(0, 5, (64,)))
    channels = map_channels(model, images.example)
    plan = make_plan(channels.named_gammas(model), channels, ratio=0.4)
    small = cut(model, plan)
    for network in (model, small):
        with torch.enable_grad():
            network[0](images.example).sum().backward()
    before, state = [seen_of(network) for network in (model, small)], torch.get_rng_state()
    USES[use](model, small, plan, images)
    assert [seen_of(network) for network in (model, small)] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
