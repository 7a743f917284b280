"""Small networks put together at random, of the parts that people couple channels with."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from test_prune_nets import scramble
from torch import Tensor, nn


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


class Around(nn.Module):
    """Other parts in a branch, and what a network does with it."""

    def __init__(self, width: int, how: str, inner: list["Tree"]) -> None:
        super().__init__()
        self.how, self.inner = how, sequence(inner, width)
        self.down = normed(2 * width, width) if how == "stacked" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "summed":
            return x + self.inner(x)
        if self.how == "gating":
            return x * torch.sigmoid(self.inner(x))
        if self.how == "stacked":
            return self.down(torch.cat([x, self.inner(x)], 1))
        return self.inner(x) - F.relu(self.inner(x))


PARTS = [Plain, Bare, Summed, PreActivated, Stacked, Grouped, Depthwise, Gated, Shuffled, Flattened]
Tree = type[nn.Module] | tuple[str, list["Tree"]]


def trees(most: int) -> st.SearchStrategy[list[Tree]]:
    """Draw lists of parts, some of them around lists of parts."""
    around = st.sampled_from(["summed", "gating", "stacked", "twice"])
    leaf = st.sampled_from(PARTS)
    tree = leaf | st.recursive(
        leaf, lambda inner: st.tuples(around, st.lists(inner, min_size=1, max_size=2)), max_leaves=4
    )
    return st.lists(tree, min_size=1, max_size=most)


def sequence(parts: list[Tree], width: int) -> nn.Sequential:
    return nn.Sequential(*(Around(width, *part) if isinstance(part, tuple) else part(width) for part in parts))


def network(parts: list[Tree], width: int, seed: int, values: str) -> nn.Module:
    """Build a network whose gammas have these values."""
    torch.manual_seed(seed)
    ends = nn.Flatten(), nn.Linear(width * 36, 5)
    model = scramble(nn.Sequential(normed(3, width), sequence(parts, width), *ends), seed).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            gamma = module.weight.data
            if values == "ties":
                gamma.copy_(torch.randint(1, 4, gamma.shape) / 4)
            elif values == "zeros":
                gamma.mul_(torch.rand(gamma.shape) > 0.4)
            elif values == "signs":
                gamma.mul_(torch.randint(0, 2, gamma.shape) * 2 - 1)
    return model
