"""The end that pre-activation networks share."""

from torch import nn


class PreActivationHead(nn.Sequential):
    """BatchNorm, ReLU, global average, linear layer: features (n, channels, h, w) to logits (n, num_classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )
