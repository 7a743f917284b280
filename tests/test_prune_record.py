"""Networks as people write them: whatever runs is mapped, cut exactly in both modes, and left as it was."""

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_prune_nets import EXAMPLE, block, scramble
from torch import Tensor, nn

from netslim.prune import (
    ChannelMap,
    Rules,
    cut,
    cut_proved,
    largest_difference,
    make_plan,
    map_channels,
    masked,
    slim,
)
from netslim.train import ModelConfig, build_model


class BNAct(nn.BatchNorm2d):
    """A BatchNorm that activates in its own forward."""

    def __init__(self, num_features: int, act: nn.Module) -> None:
        super().__init__(num_features)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        training = self.training or self.running_mean is None
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps)
        return self.act(x)


class BNActBySuper(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.num_features > 2:
            x = x.relu_()
        return x


class OwnConv(nn.Conv2d):
    """A convolution that calls the function itself, on a padding computed from sizes."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        pad = [max((-(-size // 1) - 1) + 3 - size, 0) for size in (width, height)]
        x = F.pad(x, [pad[0] // 2, pad[0] - pad[0] // 2, pad[1] // 2, pad[1] - pad[1] // 2])
        return F.conv2d(x, self.weight, self.bias)


class Functional(nn.Module):
    """A convolution and a BatchNorm of no class of torch's."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(num_out, num_in, 3, 3) * 0.2)
        self.offset = nn.Parameter(torch.randn(num_out) * 0.1)
        self.scale, self.shift = nn.Parameter(torch.rand(num_out) + 0.1), nn.Parameter(torch.randn(num_out) * 0.3)
        self.register_buffer("mean", torch.randn(num_out) * 0.1)
        self.register_buffer("variance", torch.rand(num_out) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.offset, padding=1)
        return F.relu(F.batch_norm(x, self.mean, self.variance, self.scale, self.shift, self.training))


class Between(nn.Module):
    """Two blocks, a function between them, and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8, made: int | None = None) -> None:
        super().__init__()
        self.first, self.last = block(3, width), block(made or width, 6)
        self.function, self.head = function, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.function(self.first(x))).mean((2, 3)))


def assert_slims(model: nn.Module, example: Any = EXAMPLE, num_free: int | None = None) -> ChannelMap:
    """Slim by half under both couplings: equal to the masked network in both modes, and a step of training works."""
    torch.manual_seed(0)
    scramble(model)
    before = copy.deepcopy(model.state_dict())
    for coupling in ("group", "select"):
        channels = map_channels(model, example, coupling)
        plan = make_plan(channels.named_gammas(model, coupling), channels, ratio=0.5, coupling=coupling)
        small = cut(model, plan)
        assert plan.num_removed > 0
        assert largest_difference(model, small, plan, example) < 1e-9
        assert_same_in_training(model, small, plan, example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    found = map_channels(model, example)
    if num_free is not None:
        assert sum(layer.num_prunable for layer in found.layers) == num_free, found.summary()
    return found


def assert_same_in_training(model: nn.Module, small: nn.Module, plan: Any, example: Any) -> None:
    """Compare in training mode, BatchNorm in eval mode, by code that owes nothing to the library's own proof."""
    outputs = []
    for network in (masked(model, plan), copy.deepcopy(small)):
        network.double().train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        torch.manual_seed(1)
        wide = [
            x.double() if isinstance(x, Tensor) else x for x in (example if isinstance(example, tuple) else (example,))
        ]
        outputs.append(network(*wide))
    assert torch.allclose(*outputs, atol=1e-9)
    outputs[1].square().mean().backward()


@pytest.mark.parametrize("norm", [lambda: BNAct(8, nn.ReLU()), lambda: BNAct(8, nn.SiLU()), lambda: BNActBySuper(8)])
def test_a_batchnorm_that_activates_in_its_own_forward_is_one_with_an_activation_behind_it(norm):
    layers = [
        nn.Conv2d(3, 8, 3),
        norm(),
        nn.Conv2d(8, 8, 3),
        norm(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.LazyLinear(3),
    ]
    model = nn.Sequential(*layers)
    model(EXAMPLE)
    channels = assert_slims(model, num_free=16)
    assert all(layer.selectable for layer in channels.layers)


def test_a_batchnorm_whose_activation_is_not_zero_at_zero_has_no_selection_around_it():
    model = nn.Sequential(block(3, 8), nn.Conv2d(8, 8, 3), BNAct(8, nn.Sigmoid()), nn.Conv2d(8, 4, 1))
    _, odd = map_channels(model, EXAMPLE).layers
    assert not odd.num_prunable
    assert not odd.selectable


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = block(3, 8), block(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        b, c, _, _ = x.shape
        assert c == 3
        if x.shape[0] > 1:
            x = x * 1.0
        x = self.first(x)
        left, right = list(x.chunk(2, 1))
        x = torch.cat([right, left], 1)
        x = self.last(x)
        flat = 1
        for d in x.size()[1:]:
            flat *= d
        x = x.view(b, x.shape[1], flat // x.shape[1]).mean(-1)
        return self.head(x)


def test_control_flow_on_shapes_is_run_as_it_is():
    channels = assert_slims(Shapes())
    assert channels.layers[0].num_prunable == 8


def test_the_channels_that_a_network_compares_with_a_number_stay_and_the_line_is_named():
    def checked(x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        return x

    first, last = map_channels(Between(checked), EXAMPLE).layers
    assert last.num_prunable == 6
    ((reason, count),) = first.reasons
    assert count == 8
    assert reason.startswith("its number of channels is compared at ")
    assert "test_prune_record.py:" in reason


def test_equal_counts_of_the_same_channels_may_be_compared():
    def checked(x: Tensor) -> Tensor:
        assert x.shape[1] == x.relu().shape[1]
        assert x.shape[1] > 0
        return x

    assert_slims(Between(checked), num_free=14)


class Modal(nn.Module):
    """Training runs another network than evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = block(3, 8), block(8, 8), block(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if not self.training:
            x = self.b(x)
        return self.head(self.c(x).mean((2, 3)))


def test_a_block_that_training_skips_couples_the_channels_around_it():
    model = Modal()
    channels = assert_slims(model, num_free=22)
    assert channels.layers[0].classes == channels.layers[1].classes
    with torch.no_grad():
        model.a[1].weight.copy_(torch.arange(1.0, 9.0))
        model.b[1].weight.copy_(torch.arange(8.0, 0.0, -1.0))
    small, plan = slim(model, EXAMPLE, ratio=0.5)
    assert plan.kept["a.1"] == plan.kept["b.1"]
    assert_same_in_training(model, small, plan, EXAMPLE)


def test_noise_of_a_fixed_width_in_training_holds_its_channels():
    class Noisy(Modal):
        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            if self.training:
                x = x + 0.1 * torch.randn(1, 8, 1, 1).to(x)
            return self.head(self.c(x).mean((2, 3)))

    channels = map_channels(Noisy(), EXAMPLE)
    assert [layer.num_prunable for layer in channels.layers] == [8, 0, 6]


def test_a_convolution_that_a_subclass_computes_itself_is_a_convolution():
    layers = [nn.Sequential(OwnConv(a, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for a in (3, 8, 8)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert_slims(model, num_free=24)
    small, plan = slim(model, EXAMPLE, ratio=0.5, coupling="select")
    assert plan.num_removed == 12
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_layers_of_no_class_of_torchs_are_known_by_their_parameters():
    model = nn.Sequential(Functional(3, 8), Functional(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    channels = map_channels(model, EXAMPLE)
    assert [layer.name for layer in channels.layers] == ["0.scale", "1.scale"]
    assert [layer.num_prunable for layer in channels.layers] == [8, 6]
    small, plan = slim(model, EXAMPLE, ratio=0.5)
    assert plan.num_removed == 7
    assert small[0].kernel.shape[0] == small[1].kernel.shape[1] == len(small[0].variance) == len(small[0].shift)
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-9


PASSING = {
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "view_as": lambda x: x.contiguous().view_as(x),
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x),
    "stack": lambda x: torch.stack([x, x], 2).mean(2),
    "power": lambda x: x**2,
    "maximum": lambda x: torch.maximum(x, 0.5 * x),
    "roll": lambda x: x.roll(1, 2),
    "flip": lambda x: x.flip(3),
    "unflatten": lambda x: x.unflatten(2, (4, -1)).flatten(2, 3),
    "movedim": lambda x: x.movedim(1, 3).movedim(3, 1),
    "narrow": lambda x: x.narrow(2, 0, 8),
    "split": lambda x: torch.cat(x.split([16, 16], 2), 2),
    "type_as": lambda x: x.type_as(x),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "channels last": lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
    "sum from zero": lambda x: sum([x, x.relu()]),
    "add zero": lambda x: 0 + x,
    "scaled": lambda x: x * 3 - 0.0,
    "number of channels": lambda x: x.view(x.shape[0], x.shape[1], -1).view(x.size(0), x.size(1), 32, 32),
    "zeros of its width": lambda x: x + torch.zeros(1, x.shape[1], 1, 1, device=x.device, dtype=x.dtype),
    "hardswish in place": lambda x: F.hardswish(x * 1.0, inplace=True),
    "normalise": lambda x: F.normalize(x, dim=1),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "gate over places": lambda x: x * torch.sigmoid(x.sum(1, keepdim=True)),
}


@pytest.mark.parametrize("name", PASSING)
def test_channels_are_followed_through(name):
    assert_slims(Between(PASSING[name]), num_free=14)


class Scaled(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(*shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Blurred(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("filter", torch.ones(width, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filter, padding=1, groups=x.shape[1])


MODULES = {
    "slopes": (lambda: nn.PReLU(8), 8),
    "layer scale": (lambda: Scaled(8, 1, 1), 8),
    "a scale for each channel and place": (lambda: Scaled(1, 8, 32, 32), 8),
    "instance normalisation": (lambda: nn.InstanceNorm2d(8), 8),
    "blur": (lambda: Blurred(8), 8),
    "repeat": (lambda: Lambda(lambda x: x.repeat(1, 2, 1, 1)), 16),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), 2),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), 32),
    "gated linear unit": (lambda: nn.GLU(1), 4),
    "padded with zeros": (lambda: Lambda(lambda x: F.pad(x, (0, 0, 0, 0, 0, 4))), 12),
}


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", MODULES)
def test_channels_are_followed_through_modules(name):
    build, made = MODULES[name]
    assert_slims(Between(build(), made=made), num_free=14)


def test_an_unknown_function_holds_its_channels_and_names_itself_and_the_line():
    first, last = map_channels(Between(lambda x: torch.fft.fft2(x).real), EXAMPLE).layers
    ((reason, _),) = first.reasons
    assert reason.startswith("operation 'fft_fft2' is not known to keep channels apart at ")
    assert "test_prune_record.py:" in reason
    assert last.num_prunable == 6


class Twice(nn.Module):
    """One backbone, called on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(block(3, 8), block(8, 6)), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.body(x) - self.body(y)).mean((2, 3)))


def test_a_module_that_is_called_twice_is_cut_once_for_both():
    assert_slims(Twice(), (EXAMPLE, EXAMPLE.flip(-1)), num_free=14)


class Named(Twice):
    def forward(self, batch: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(batch["left"], batch["right"]) * scale}


@pytest.mark.parametrize(
    "example",
    [
        ({"left": EXAMPLE, "right": EXAMPLE.flip(-1)}, torch.ones(1)),
        {"batch": {"left": EXAMPLE, "right": EXAMPLE.flip(-1)}, "scale": torch.ones(1)},
        [{"left": EXAMPLE, "right": EXAMPLE.flip(-1)}, torch.ones(1)],
    ],
)
def test_an_example_may_be_arguments_by_place_or_by_name(example):
    model = scramble(Named())
    small, plan = slim(model, example, ratio=0.5)
    assert plan.num_removed == 7
    assert largest_difference(model, small, plan, example) < 1e-9


def test_a_hook_that_keeps_features_works_and_nothing_of_the_copys_stays_behind():
    model, features = scramble(Between(nn.ReLU())), {}
    model.first.register_forward_hook(lambda module, args, result: features.__setitem__("first", result))
    model.last.register_forward_hook(lambda module, args, result: setattr(model, "kept", result))
    model.kept = None
    _, plan = slim(model, EXAMPLE, ratio=0.5)
    assert plan.num_removed == 7
    assert features == {}
    assert model.kept is None


def test_whatever_fails_the_model_its_hooks_and_random_numbers_are_as_they_were():
    model, seen = Between(nn.ReLU()), []
    model.first.register_forward_hook(lambda module, args, result: seen.append(result))
    model.last.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(OSError("no disk")))
    before, state = dict(vars(model)), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"does not run on an example .*'last' .*says: no disk"):
        map_channels(model, EXAMPLE)
    assert vars(model) == before
    assert seen == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_converts_to_float32_itself_is_proved_in_float32():
    model = scramble(Between(lambda x: x.float()))
    _, plan = slim(model, EXAMPLE, ratio=0.5)
    assert plan.num_removed == 7
    proved = cut_proved(model, map_channels(model, EXAMPLE), EXAMPLE, 0.5, Rules())
    assert (proved.plan.num_removed, proved.is_double) == (7, False)


def test_a_network_that_writes_its_buffers_leaves_the_users_untouched():
    class Counting(Between):
        def __init__(self) -> None:
            super().__init__(nn.ReLU())
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            x = self.first(x)
            self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
            return self.head(self.last(x).mean((2, 3)))

    model = scramble(Counting())
    small, plan = slim(model, EXAMPLE, ratio=0.5)
    assert not model.seen
    assert not model.mean.any()
    assert len(small.mean) == len(plan.kept["first.1"]) < 8


@pytest.mark.parametrize("reads_values", [False, True])  # then it runs with its numbers
def test_what_a_scripted_function_does_to_channels_is_not_known(reads_values):
    scripted = script(_halved)

    def function(x: Tensor) -> Tensor:
        return scripted(x) * float(torch.ones(1, device="cpu") if reads_values else 1)

    first, last = map_channels(Between(function), EXAMPLE).layers
    assert not first.num_prunable
    assert last.num_prunable == 6
    assert "is not known to keep channels apart at " in first.reasons[0][0]


def script(code: Any) -> Any:
    with warnings.catch_warnings():  # torch deprecates it; networks still have it
        warnings.simplefilter("ignore")
        return torch.jit.script(code)


def _halved(x: Tensor) -> Tensor:
    return x * 0.5


@pytest.mark.parametrize(
    ("wrapped", "advice"),
    [
        (nn.DataParallel, "DataParallel only wraps the network; pass model.module"),
        (torch.compile, "pass the module before torch.compile: model._orig_mod"),
        (script, "pass the module before torch.jit.script"),
    ],
)
def test_wrappers_are_refused_with_what_to_pass_instead(wrapped, advice):
    with pytest.raises(ValueError, match=advice):
        map_channels(wrapped(nn.Sequential(block(3, 4), block(4, 4))), EXAMPLE)


def test_an_example_of_another_type_or_of_nothing_is_refused():
    model = Between(nn.ReLU())
    with pytest.raises(ValueError, match=r"the example is torch.float64, the network torch.float32"):
        map_channels(model, EXAMPLE.double())
    with pytest.raises(ValueError, match=r"no tensors is no batch of images"):
        map_channels(model, ())


def test_little_that_can_go_is_warned_of_once_with_shares_and_reasons():
    wide = nn.Sequential(block(3, 64), Lambda(lambda x: torch.fft.fft2(x).real), nn.Conv2d(64, 64, 3))
    model = nn.Sequential(wide, block(64, 4), nn.Flatten(), nn.Linear(4 * 900, 2))
    line = (
        r"^little of this network can go: 5.9% of its 68 channels, with them at most .*% of the parameters; 64 stay: op"
    )
    with pytest.warns(UserWarning, match=line) as caught:
        slim(scramble(model), EXAMPLE, ratio=0.5)
    assert len(caught) == 1


def test_gammas_whose_removal_shrinks_nothing_are_not_counted_one_by_one():
    class Own(nn.Module):
        """A layer whose channels are held on both sides of a BatchNorm."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.fft.fft2(self.norm(torch.fft.fft2(self.first(x)).real)).real
            return self.last(x).mean((2, 3))

    odd, last = map_channels(Own(), EXAMPLE, "select").layers
    assert not odd.selectable
    assert all(last.removable("select"))


@pytest.mark.parametrize("coupling", ["group", "select"])
def test_images_whose_channels_lie_last_in_memory_stay_so_at_every_convolution(coupling):
    model = scramble(build_model(ModelConfig(name="preresnet20"), 10, 0)).to(memory_format=torch.channels_last)
    small, _ = slim(model, EXAMPLE, ratio=0.5, coupling=coupling)
    odd = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not args[0].is_contiguous(memory_format=torch.channels_last):
            odd.append(module)

    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    small(EXAMPLE.contiguous(memory_format=torch.channels_last))
    assert not odd


def test_a_network_of_random_depth_is_mapped_whatever_it_drew():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b, self.head = block(3, 8), block(8, 8), block(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if not self.training or random.random() < 0.5:
                x = self.a(x)
            if not self.training or np.random.rand() < 0.5:
                x = self.b(x)
            return self.head(x.mean((2, 3)))

    state = random.getstate()
    channels = map_channels(Deep(), EXAMPLE)
    assert random.getstate() == state
    assert channels.layers[0].classes == channels.layers[1].classes == channels.layers[2].classes


def test_what_the_proof_alone_finds_stays_and_the_line_is_named():
    table = {8: 1.0}  # there is nothing in it for another number of channels

    def looked_up(x: Tensor) -> Tensor:
        return x * table[len(x[0])]

    model = scramble(Between(looked_up))
    with pytest.warns(UserWarning, match=r"^8 channels stay: .*'first.1' the cut network does not run at .*:\d+: \d$"):
        small, plan = slim(model, EXAMPLE, ratio=0.5)
    assert len(plan.kept["first.1"]) == 8
    assert plan.num_removed == 3
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-9


def test_numbers_of_channels_that_python_keeps_for_itself_are_found_by_the_proof():
    def halved(x: Tensor) -> Tensor:
        return x / float(len(x[0]))  # the mean over channels, as if it were nothing

    model = scramble(Between(halved))
    with pytest.warns(UserWarning, match=r"^8 channels stay: .* differs from the masked one by "):
        _, plan = slim(model, EXAMPLE, ratio=0.5)
    assert len(plan.kept["first.1"]) == 8
