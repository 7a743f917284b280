"""Small networks of every shape that the channel map meets, and the claim that all of them are cut exactly."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from netslim.prune import cut, largest_difference, make_plan, map_channels, masked, slim

EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm random gammas, betas and statistics, so that no channel is like another."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.05)
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


def block(num_in: int, num_out: int, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, padding=1, bias=False, **options), nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)
    )


def chain(*widths: int) -> nn.Sequential:
    """A VGG in small: blocks, pooling to 2x2, flatten into linear layers with a BatchNorm1d between them."""
    blocks = [block(a, b) for a, b in zip((3, *widths), widths, strict=False)]
    blocks.insert(1, nn.MaxPool2d(2))
    head = [nn.Linear(widths[-1] * 4, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(), nn.Linear(24, 10)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)


class Catenated(nn.Module):
    """conv-bn-relu twice side by side, and conv-cat-bn: all read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = block(3, 6), block(6, 5), block(6, 7)
        self.bare_left, self.bare_right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.tail = block(19, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        bare = self.norm(torch.cat([self.bare_left(x), self.bare_right(x)], 1))
        x = self.tail(torch.cat((self.left(x), F.leaky_relu(bare), self.right(x)), dim=1))
        return self.head(x.mean(dim=(2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.inner, self.outer = block(8, 12), nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.outer(self.inner(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Gated(nn.Module):
    """A gate, a depthwise convolution and a convolution that reads before the BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = block(3, 8), block(8, 8, groups=8)
        self.early, self.late = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.peek, self.inner = nn.Conv2d(6, 4, 1), block(6, 9)
        self.gate, self.head = nn.Conv2d(9, 4, 1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.deep(self.first(x)))
        y = self.gate(self.inner(self.late(x)))
        return self.head((self.peek(x) * torch.sigmoid(y)).mean((2, 3)))


class Shuffling(nn.Module):
    """Moves data in all manners: what counts channels freezes them, what carries them along does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = block(3, 8), block(4, 6), block(6, 6), block(6, 6)
        self.e, self.head = block(6, 5), nn.Linear(5 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(F.avg_pool2d(x, 8)).chunk(2, dim=1)
        x = self.b(left.contiguous()) + self.b[0](right)
        n, c, h, w = x.size()
        x = self.c(x).permute(0, 2, 3, 1).transpose(1, 2).permute(0, 3, 2, 1)
        x = self.d(x.view(x.shape[0], -1, h, w))
        x = self.e(x.view(n, 2, 3, h, w).transpose(1, 2).reshape(n, c, h, w))
        return self.head(x.unsqueeze(0).squeeze(0)[:, :, :].reshape(x.size(0), -1))


class Resized(nn.Module):
    """Resizing, padding, shuffling, limits and sums over places; a shortcut that pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = block(3, 6), block(6, 6), block(6, 10, stride=2)
        self.norm, self.slope, self.shuffle = nn.BatchNorm2d(10), nn.PReLU(), nn.ChannelShuffle(2)
        self.pads = nn.Sequential(nn.ZeroPad2d(1), nn.ReflectionPad2d(2), nn.ReplicationPad2d((1, 0, 1, 0)))
        self.up, self.tail, self.head = nn.Upsample(scale_factor=2), block(10, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.stem(x))
        x = x + F.interpolate(self.left(F.max_pool2d(x, 2)), x.shape[-2:], mode="bilinear", align_corners=False)
        x = self.right(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.hardtanh(self.pads(self.norm(x)), -3, 3)
        x = self.shuffle(self.tail(self.up(F.pad(x, (1, 1, 0, 0), mode="circular"))).clamp(0, 6))
        return self.head(F.interpolate(x, size=5, mode="bicubic").sum((2, 3)))


def zoo(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, num_classes=10, **options)


def small_vgg() -> nn.Module:
    """torchvision's VGG-11 at a quarter of its width, without the two hidden layers of 4096."""
    widths = [width if isinstance(width, str) else width // 4 for width in models.vgg.cfgs["A"]]
    features = models.vgg.make_layers(widths, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(128 * 49, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: chain(12, 10, 14),
    "catenated": Catenated,
    "residual": Residual,
    "gated": Gated,
    "shuffling": Shuffling,
    "resized": Resized,
    "vgg": small_vgg,
    "resnet18": zoo("resnet18"),
    "googlenet": zoo("googlenet", aux_logits=False, init_weights=False),
    "mobilenet_v2": zoo("mobilenet_v2", width_mult=0.25),
    "shufflenet_v2_x0_5": zoo("shufflenet_v2_x0_5"),
}


@pytest.mark.parametrize("name", NETS)
def test_every_network_is_cut_exactly(name):
    torch.manual_seed(0)
    model = scramble(NETS[name]()).eval()
    small, plan = slim(model, EXAMPLE, ratio=0.5)  # raises beyond 1e-5
    assert largest_difference(model, small, plan, EXAMPLE) < 1e-10
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("ratio", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_cut_keeps_the_logits_of_the_masked_network_in_float32(ratio):
    torch.manual_seed(0)
    model = scramble(chain(32, 48, 64, 64)).eval()
    channels = map_channels(model, EXAMPLE)
    plan = make_plan(channels.named_gammas(model), channels, ratio=ratio)
    with torch.no_grad():
        want, have = masked(model, plan)(EXAMPLE), cut(model, plan)(EXAMPLE)
    assert (want - have).abs().max() <= 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"])
def test_every_channel_of_a_vgg_is_prunable(name):
    with torch.device("meta"):  # the map asks for shapes only
        model = models.get_model(name, weights=None, init_weights=False)
    channels = map_channels(model, EXAMPLE)
    assert all(all(layer.prunable) for layer in channels.layers)
