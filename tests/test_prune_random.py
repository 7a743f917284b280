"""Small networks put together at random: whatever couples their channels, the cut equals the masked network."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_prune_nets import scramble
from torch import Tensor, nn

from netslim.prune import cut, largest_difference, make_plan, map_channels

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def normed(num_in: int, num_out: int, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, padding=1, **options), nn.BatchNorm2d(num_out), nn.ReLU())


class Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = normed(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Bare(nn.Module):
    """A convolution that no BatchNorm follows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Summed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = normed(width, width), nn.Sequential(normed(width, 4), nn.Conv2d(4, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.left(x) + x - self.right(x))


class PreActivated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(width), nn.Sequential(normed(width, 4), nn.Conv2d(4, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(F.gelu(self.norm(x)))


class Stacked(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right, self.down = normed(width, 4), nn.Conv2d(width, 3, 1), normed(width + 7, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([self.left(x), x, self.right(x)], 1))


class Grouped(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = normed(width, width * 2, groups=2)
        self.back = normed(width * 2, width, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.body(x))


class Depthwise(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep, self.norm = nn.Conv2d(width, width * 2, 3, padding=1, groups=width), nn.BatchNorm2d(width * 2)
        self.back = nn.Conv2d(width * 2, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.hardswish(self.norm(self.deep(x))))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.down, self.up = normed(width, width), nn.Linear(width, 3), nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        n, c, _, _ = x.size()
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3)).view(n, c))))).view(n, c, 1, 1)
        return x * gate


class Shuffled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = normed(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.part(right)], 1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Flattened(nn.Module):
    """A spatial gate, and a linear layer that reads all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.gate = normed(width, width), nn.Conv2d(width, 1, 1)
        self.all = nn.Linear(width * 36, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x * torch.sigmoid(self.gate(x))
        return x + self.all(x.flatten(1)).unsqueeze(2).unsqueeze(3)


PARTS = [Plain, Bare, Summed, PreActivated, Stacked, Grouped, Depthwise, Gated, Shuffled, Flattened]


def network(parts: list[type[nn.Module]], width: int) -> nn.Module:
    torch.manual_seed(0)
    body = [part(width) for part in parts]
    return scramble(nn.Sequential(normed(3, width), *body, nn.Flatten(), nn.Linear(width * 36, 5))).eval()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=5),
    width=st.sampled_from([4, 8]),
    ratio=st.floats(0.05, 0.6),
    coupling=st.sampled_from(["group", "select"]),
    seed=st.integers(0, 1000),
)
def test_a_random_network_is_cut_exactly(parts, width, ratio, coupling, seed):
    model = scramble(network(parts, width), seed)
    check(model, ratio, coupling)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=7),
    width=st.sampled_from([4, 8]),
    ratio=st.floats(0.05, 0.6),
    coupling=st.sampled_from(["group", "select"]),
    seed=st.integers(0, 1000),
)
def test_many_random_networks_are_cut_exactly(parts, width, ratio, coupling, seed):
    model = scramble(network(parts, width), seed)
    check(model, ratio, coupling)


def check(model: nn.Module, ratio: float, coupling: str) -> None:
    try:
        channels = map_channels(model, IMAGES, coupling)
        gammas = channels.named_gammas(model, coupling)
        plan = make_plan(gammas, channels, ratio=ratio, coupling=coupling)
    except ValueError as error:  # classes as large as the network leave nothing to choose
        if "no channel of the network is prunable" in str(error) or "largest ratio possible" in str(error):
            return
        raise
    small = cut(model, plan)
    assert largest_difference(model, small, plan, IMAGES) < 1e-10
    small.train()(IMAGES).square().mean().backward()
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())
    if coupling == "select":
        assert plan.num_removed == plan.num_asked
