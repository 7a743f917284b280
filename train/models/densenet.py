"""DenseNet without bottlenecks, CIFAR form (Huang et al. 2017, arXiv 1608.06993)."""

import torch
from torch import Tensor, nn

from netslim.train.models.head import PreActivationHead


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution; its ``growth`` new channels are appended to the ones it read."""

    def __init__(self, num_inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_inputs, growth, 3, padding=1, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        return torch.cat([stream, self.conv(self.relu(self.norm(stream)))], dim=1)


class Transition(nn.Sequential):
    """BatchNorm, ReLU, 1x1 convolution and a pool that halves the resolution; the number of channels stays."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.AvgPool2d(2),
        )


class DenseNet(nn.Module):
    """Three dense blocks of (depth - 4) / 3 layers each, growth 12 x width.

    Input (n, 3, height, width); output logits (n, num_classes). Raises ValueError where the depth does not divide.
    """

    def __init__(self, depth: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        layers_per_block, remainder = divmod(depth - 4, 3)
        if remainder or layers_per_block < 1:
            raise ValueError(f"depth {depth} is not 3n + 4; try {3 * max(1, layers_per_block) + 4}")
        growth = max(1, round(12 * width))
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for block in range(3):
            if block > 0:
                layers.append(Transition(channels))
            for _ in range(layers_per_block):
                layers.append(DenseLayer(channels, growth))
                channels += growth
        self.blocks = nn.Sequential(*layers)
        self.head = PreActivationHead(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits
