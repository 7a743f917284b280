"""Networks of timm and torchvision by name: how each is built, and an example that it runs on."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Network:
    """A network of a library: what makes it, and the arguments it is called with."""

    name: str
    file: str
    """The module of the library that has it."""
    make: Callable[[], nn.Module]
    example: Callable[[nn.Module], Any]

    def build(self, seed: int = 0) -> nn.Module:
        """Make it with random weights, the same for the same seed, in eval mode."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return scrambled(self.make()).eval()


def timm_network(name: str, size: int | None = None, **options: Any) -> Network:
    """A network of timm at its own size of images, or at another one."""
    import timm

    def example(model: nn.Module) -> Tensor:
        channels, *sizes = model.pretrained_cfg.get("input_size", (3, 224, 224))
        return images(2, channels, *(sizes if size is None else (size, size)))

    file = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return Network(name, file, partial(timm.create_model, name, **options), example)


def timm_files() -> dict[str, list[str]]:
    """The names of timm's networks, by the file that has them; without the toys that timm itself is tested by."""
    import timm

    files: dict[str, list[str]] = {}
    for name in timm.list_models(exclude_filters="test_*"):
        files.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], []).append(name)
    return files


def smallest(names: Iterable[str]) -> str | None:
    """The one of fewest parameters among timm's networks that have a BatchNorm; none if none of these has one."""
    sizes: dict[str, int] = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _without_numbers(name)
        if any(isinstance(module, NORMS) for module in model.modules()):
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=lambda name: sizes[name], default=None)


def _without_numbers(name: str) -> nn.Module:
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except (NotImplementedError, RuntimeError):  # some compute their widths with tensors
        return timm.create_model(name)


def scrambled(model: nn.Module) -> nn.Module:
    """Give all that starts constant random values, and so every BatchNorm: else a wrong channel might not show.

    Scales of layers begin at 1e-6, the last scale of a residual block or a whole head at 0.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel() or parameter.min() != parameter.max():
                continue
            if parameter.flatten()[0]:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape) * 0.1 / math.sqrt(max(1, parameter[:1].numel())))
        for module in model.modules():
            if isinstance(module, NORMS) and module.affine:
                module.weight.copy_(torch.rand(module.num_features) + 0.05)
                # a layer's last channel below zero would end the signal in a ReLU
                module.bias.copy_(torch.randn(module.num_features).abs())
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def detector(name: str, *, keypoints: bool = False, masks: bool = False, **options: Any) -> Network:
    """A detector with what training needs beside the images; all boxes are outputs, however improbable."""

    def example(model: nn.Module) -> tuple[Any, ...]:
        pictures = [images(3, 128, 160), images(3, 160, 128)]
        boxes = torch.tensor([[8.0, 10.0, 70.0, 90.0], [40.0, 30.0, 120.0, 110.0], [20.0, 60.0, 50.0, 100.0]])
        targets = []
        for number, picture in enumerate(pictures):
            target: dict[str, Tensor] = {"boxes": boxes + number, "labels": torch.tensor([1, 1, 1])}
            if masks:
                target["masks"] = (images(3, *picture.shape[1:]) > 0).to(torch.uint8)
            if keypoints:
                places = boxes[:, None, :2] + torch.rand(3, 17, 2, generator=torch.Generator().manual_seed(2)) * 20
                target["keypoints"] = torch.cat([places, torch.ones(3, 17, 1)], 2)
            targets.append(target)
        return pictures, targets

    make = partial(models.get_model, name, weights=None, weights_backbone=None, **options)
    return Network(name, "detection", make, example)


def _classified(name: str, file: str, *shape: int, **options: Any) -> Network:
    return Network(name, file, partial(models.get_model, name, weights=None, **options), lambda _: images(*shape))


def _torchvision() -> list[Network]:
    small = {"min_size": 128, "max_size": 160}
    rcnn = {**small, "box_score_thresh": 0.0}
    dense = {**small, "score_thresh": 0.0}
    dense_one = {"score_thresh": 0.0}
    maps = {"weights_backbone": None, "aux_loss": True}
    quantized = ("googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_large", "resnet18", "shufflenet_v2_x0_5")
    return [
        _classified("fcn_resnet50", "segmentation", 2, 3, 64, 64, **maps),
        _classified("deeplabv3_resnet50", "segmentation", 2, 3, 64, 64, **maps),
        _classified("deeplabv3_mobilenet_v3_large", "segmentation", 2, 3, 64, 64, **maps),
        _classified("lraspp_mobilenet_v3_large", "segmentation", 2, 3, 64, 64, weights_backbone=None),
        detector("fasterrcnn_resnet50_fpn", **rcnn),
        detector("fasterrcnn_resnet50_fpn_v2", **rcnn),
        detector("fasterrcnn_mobilenet_v3_large_fpn", **rcnn),
        detector("fasterrcnn_mobilenet_v3_large_320_fpn", **rcnn),
        detector("maskrcnn_resnet50_fpn", masks=True, **rcnn),
        detector("maskrcnn_resnet50_fpn_v2", masks=True, **rcnn),
        detector("keypointrcnn_resnet50_fpn", keypoints=True, num_classes=2, **rcnn),
        detector("retinanet_resnet50_fpn", **dense),
        detector("retinanet_resnet50_fpn_v2", **dense),
        detector("fcos_resnet50_fpn", **dense),
        detector("ssd300_vgg16", **dense_one),
        detector("ssdlite320_mobilenet_v3_large", **dense_one),
        _classified("r3d_18", "video", 2, 3, 4, 32, 32),
        _classified("mc3_18", "video", 2, 3, 4, 32, 32),
        _classified("r2plus1d_18", "video", 2, 3, 4, 32, 32),
        _classified("s3d", "video", 2, 3, 16, 224, 224),
        *(
            _classified(f"quantized_{name}", "quantization", 2, 3, size, size, quantize=False)
            for name, size in ((name, 299 if name == "inception_v3" else 96) for name in quantized)
        ),
        Network(
            "raft_large",
            "optical_flow",
            partial(models.get_model, "raft_large", weights=None),
            lambda _: (images(2, 3, 128, 128), images(2, 3, 128, 128).flip(-1), 2),
        ),
    ]


TORCHVISION = {network.name: network for network in _torchvision()}


def network_of(name: str) -> Network:
    """A network by its name, of torchvision's beyond classifiers or else of timm's."""
    return TORCHVISION[name] if name in TORCHVISION else timm_network(name)
