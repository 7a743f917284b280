"""Pre-activation ResNet with bottlenecks, CIFAR form (He et al. 2016, arXiv 1603.05027)."""

from torch import Tensor, nn

from netslim.train.models.head import PreActivationHead


class Bottleneck(nn.Module):
    """BatchNorm, ReLU and convolution three times (1x1, 3x3, 1x1), added to the stream; the output has 4 x channels."""

    expansion = 4

    def __init__(self, num_inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        num_outputs = channels * self.expansion
        self.bn1 = nn.BatchNorm2d(num_inputs)
        self.conv1 = nn.Conv2d(num_inputs, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, num_outputs, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        changes_shape = stride != 1 or num_inputs != num_outputs
        self.shortcut = nn.Conv2d(num_inputs, num_outputs, 1, stride=stride, bias=False) if changes_shape else None

    def forward(self, stream: Tensor) -> Tensor:
        branch = self.conv1(self.relu(self.bn1(stream)))
        branch = self.conv2(self.relu(self.bn2(branch)))
        branch = self.conv3(self.relu(self.bn3(branch)))
        total: Tensor = branch + (stream if self.shortcut is None else self.shortcut(stream))
        return total


class PreResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels x width; ``depth`` is 9n + 2 with n bottlenecks in each stage.

    Input (n, 3, height, width); output logits (n, num_classes). Raises ValueError for another depth.
    """

    def __init__(self, depth: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        blocks_per_stage, remainder = divmod(depth - 2, 9)
        if remainder or blocks_per_stage < 1:
            raise ValueError(f"depth {depth} is not 9n + 2; try {9 * max(1, blocks_per_stage) + 2}")
        channels = [max(1, round(c * width)) for c in (16, 32, 64)]
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        num_inputs = channels[0]
        for stage, width_of_stage in enumerate(channels):
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(num_inputs, width_of_stage, stride))
                num_inputs = width_of_stage * Bottleneck.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = PreActivationHead(num_inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits
