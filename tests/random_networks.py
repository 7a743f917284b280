"""Small networks put together at random, of the parts that people couple channels with."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from test_prune_nets import scramble
from torch import Tensor, nn

from netslim.prune import Plan


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


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that activates in its own forward."""

    def __init__(self, width: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__(width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        own = self.running_mean, self.running_var, self.weight, self.bias
        return self.act(F.batch_norm(x, *own, self.training, self.momentum, self.eps))


class Activated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 1), NormAct(2 * width, F.silu))
        self.back = nn.Sequential(nn.Conv2d(2 * width, width, 1), NormAct(width, F.relu))
        self.gate = nn.Sequential(nn.Conv2d(width, width, 1), NormAct(width, torch.sigmoid))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.body(x)) * self.gate(x)


class OwnConv(nn.Conv2d):
    """A convolution that calls the function itself, on a padding computed from sizes."""

    def forward(self, x: Tensor) -> Tensor:
        lost = [size - max(1, size - 2) for size in x.shape[:1:-1]]
        x = F.pad(x, [side for both in lost for side in (both // 2, both - both // 2)])
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


class Owned(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(OwnConv(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.back = nn.Sequential(OwnConv(2 * width, width, 3, groups=width), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.body(x))


class Functional(nn.Module):
    """A convolution, one of a filter for each channel, and a BatchNorm, all of no class of torch's."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(num_out, num_in, 3, 3) / num_in)
        self.offset = nn.Parameter(torch.randn(num_out) * 0.1)
        self.filter = nn.Parameter(torch.randn(num_out, 1, 3, 3) * 0.3)
        self.scale, self.shift = nn.Parameter(torch.rand(num_out) + 0.05), nn.Parameter(torch.randn(num_out) * 0.3)
        self.register_buffer("mean", torch.randn(num_out) * 0.1)
        self.register_buffer("variance", torch.rand(num_out) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.offset, padding=1)
        x = F.relu(F.batch_norm(x, self.mean, self.variance, self.scale, self.shift, self.training))
        return F.conv2d(x, self.filter, padding=1, groups=x.shape[1])


class Functionals(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(Functional(width, 2 * width), Functional(2 * width, width))


class Shaped(nn.Module):
    """Questions to shapes, halves in a list, and places read by sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = normed(width // 2, width), normed(width // 2, width)
        self.all = nn.Linear(width * 36, width)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        if x.shape[0] > 1:
            x = x * 0.5
        halves = list(x.chunk(2, 1))
        x = self.left(halves[1]) - self.right(halves[0])
        size = 1
        for each in x.size()[1:]:
            size *= each
        return x * torch.sigmoid(self.all(x.view(x.size(0), size))).view(len(x), -1, 1, 1)


class Around(nn.Module):
    """Other parts in a branch, and what a network does with it."""

    def __init__(self, width: int, how: str, inner: list["Tree"]) -> None:
        super().__init__()
        self.how, self.inner, widths = how, sequence(inner, width), {"stacked": 2 * width, "shared": width}
        self.down = normed(widths[how], width) if how in widths else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "summed":
            return x + self.inner(x)
        if self.how == "gating":
            return x * torch.sigmoid(self.inner(x))
        if self.how == "stacked":
            return self.down(torch.cat([x, self.inner(x)], 1))
        if self.how == "shared":
            return self.inner(x) - self.inner(self.down(x))
        if self.how in ("training", "evaluating"):
            return self.inner(x) if self.training == (self.how == "training") else x
        return self.inner(x) - F.relu(self.inner(x))


class Network(nn.Module):
    """Parts in a row, called with images or a dictionary of them; of some, training returns features too."""

    def __init__(self, parts: list["Tree"], width: int, form: str) -> None:
        super().__init__()
        self.form, self.stem, self.body = form, normed(3, width), sequence(parts, width)
        self.ends = nn.Sequential(nn.Flatten(), nn.Linear(width * 36, 5))

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        x = self.stem(x["x"] if isinstance(x, dict) else x)
        out = self.ends(self.body(x))
        return {"out": out, "features": x} if self.form == "featured" and self.training else out


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
EXAMPLES = {"plain": IMAGES, "featured": IMAGES, "named": {"x": IMAGES}, "batched": ({"x": IMAGES},)}
"""Form of a network -> how it is called."""
KNOWN = [Plain, Bare, Summed, PreActivated, Stacked, Grouped, Depthwise, Gated, Shuffled, Flattened]
OWN = [Activated, Owned, Functionals, Shaped]
Tree = type[nn.Module] | tuple[str, list["Tree"]]


def trees(most: int) -> st.SearchStrategy[list[Tree]]:
    """Draw lists of parts, some of them around lists of parts."""
    around = st.sampled_from(["summed", "gating", "stacked", "twice", "shared", "training", "evaluating"])
    leaf = st.sampled_from(KNOWN) | st.sampled_from(OWN)

    def branch(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        return st.tuples(around, st.lists(inner, min_size=1, max_size=2))

    return st.lists(leaf | branch(st.recursive(leaf, branch, max_leaves=4)), min_size=1, max_size=most)


def sequence(parts: list[Tree], width: int) -> nn.Sequential:
    return nn.Sequential(*(Around(width, *part) if isinstance(part, tuple) else part(width) for part in parts))


def network(parts: list[Tree], width: int, seed: int, values: str, form: str) -> Network:
    """Build a network whose gammas have these values."""
    torch.manual_seed(seed)
    model = Network(parts, width, form).eval()
    scramble(model, seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            gamma = (module.scale if isinstance(module, Functional) else module.weight).data
            if values == "ties":
                gamma.copy_(torch.randint(1, 4, gamma.shape) / 4)
            elif values == "zeros":
                gamma.mul_(torch.rand(gamma.shape) > 0.4)
            elif values == "signs":
                gamma.mul_(torch.randint(0, 2, gamma.shape) * 2 - 1)
    return model


NORMS = (nn.BatchNorm2d, Functional)


@torch.no_grad()
def masked_by_hand(model: Network, plan: Plan) -> Network:
    """Copy a network with gammas and betas at 0, by nothing but the names that its parts above give them."""
    twin = copy.deepcopy(model)
    scales = dict(twin.named_parameters())
    for layer in plan.layers:
        gone = sorted(set(range(layer.width)) - set(layer.kept))
        is_own = layer.name.endswith(".scale")
        for own, usual in (("scale", "weight"), ("shift", "bias")):
            scales[f"{layer.name.removesuffix('scale')}{own}" if is_own else f"{layer.name}.{usual}"][gone] = 0
    return twin


def outputs(model: Network, images: Tensor) -> list[Tensor]:
    """Run a network as its form says."""
    results = model(x=images) if model.form == "named" else model({"x": images} if model.form == "batched" else images)
    return [*results.values()] if isinstance(results, dict) else [results]


@torch.no_grad()
def exact_outputs(model: Network, *, is_training: bool) -> list[Tensor]:
    """Run a copy in float64, BatchNorms always in eval mode."""
    twin = copy.deepcopy(model).double().train(is_training)
    for module in twin.modules():
        if isinstance(module, NORMS):
            module.eval()
    return outputs(twin, IMAGES.double())
