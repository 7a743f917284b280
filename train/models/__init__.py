"""A name, and a number of classes, in; a network out whose weights are a function of the seed, and of a file if one is
named.

Names are those of the slimming literature's networks for CIFAR, of torchvision's and timm's classifiers, and of a
user's own functions. Which code a name stands for is nobody else's business.
"""

from torch import nn

from netslim.train.models.config import ModelConfig
from netslim.train.models.densenet import DenseNet
from netslim.train.models.networks import build_model, check_model, initialise, make_network, model_names
from netslim.train.models.own import is_own
from netslim.train.models.preresnet import PreResNet
from netslim.train.models.vgg import VGG

__all__ = [
    "VGG",
    "DenseNet",
    "ModelConfig",
    "PreResNet",
    "build_model",
    "build_network",
    "check_model",
    "initialise",
    "is_own",
    "model_names",
]


# Here, and not beside the networks: the plans that users have saved name `netslim.train.models:build_network`.
def build_network(name: str, num_classes: int, width: float = 1.0) -> nn.Module:
    """Build one of ``model_names()`` or ``timm:NAME`` with random weights; ValueError for no such name or width."""
    return make_network(name, num_classes, width)
