"""VGG in its CIFAR form: 3x3 convolutions with BatchNorm, one linear layer (Simonyan 2015, arXiv 1409.1556)."""

from torch import Tensor, nn

# Channels of the convolutions in order; "pool" halves the resolution.
LAYERS: dict[int, tuple[int | str, ...]] = {
    11: (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512),
    13: (64, 64, "pool", 128, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512),
    16: (64, 64, "pool", 128, 128, "pool", *(256,) * 3, "pool", *(512,) * 3, "pool", *(512,) * 3),
    19: (64, 64, "pool", 128, 128, "pool", *(256,) * 4, "pool", *(512,) * 4, "pool", *(512,) * 4),
}


class VGG(nn.Module):
    """The chain network that the network-slimming paper reports on (Liu et al. 2017, arXiv 1708.06519, table 1).

    Input (n, 3, height, width) with height and width of at least 16; output logits (n, num_classes).
    """

    def __init__(self, depth: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_inputs = 3
        for item in LAYERS[depth]:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                continue
            num_outputs = max(1, round(item * width))
            # no bias: the BatchNorm after it has one
            layers += [nn.Conv2d(num_inputs, num_outputs, 3, padding=1, bias=False), nn.BatchNorm2d(num_outputs)]
            layers.append(nn.ReLU(inplace=True))
            num_inputs = num_outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(num_inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return logits
