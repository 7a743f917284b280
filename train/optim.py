"""The optimizer and its schedule: parameter groups by type, the learning rate a pure function of the step."""

import math
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.base import plainly


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FitConfig:
    epochs: Annotated[int, Field(ge=1)] = 160
    """Passes over the training images."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate, for the whole batch."""
    schedule: Literal["cosine", "step", "onecycle", "constant"] = "step"
    """How the learning rate falls: to 0 by a cosine, by steps at the milestones, up and down linearly, or not."""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Shares of the epochs after which the step schedule multiplies the learning rate by step_factor."""
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of the step schedule."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs over which the learning rate rises linearly from 0; for onecycle the rise (0: a quarter of all)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """L2 weight decay."""
    decay: Literal["all", "weights"] = "all"
    """What decays: all parameters, as in the paper's code, or the weights of convolution and linear layers only."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes (arXiv 1512.00567)."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Steps that may be left out because a loss or gradient is not finite, before training stops there."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest L2 norm of the gradient of the loss; the gamma penalty is added after it. None: no clipping."""

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set momentum 0.9 or leave nesterov off")

    @property
    def unread(self) -> dict[str, str]:
        """The fields that nothing reads beside the others, and why."""
        of_steps = ("milestones", "step_factor") if self.schedule != "step" else ()
        return dict.fromkeys(of_steps, f"schedule is {self.schedule}") | (
            {} if self.weight_decay else {"decay": "weight_decay is 0"}
        )


def learning_rate(step: int, *, steps_per_epoch: int, config: FitConfig) -> float:
    """The learning rate of optimizer step ``step``, which counts from 0 up to epochs x steps_per_epoch."""
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    if config.schedule == "onecycle" and not warmup:
        warmup = total / 4
    if step < warmup:
        return config.lr * (step + 1) / (math.floor(warmup) + 1)
    done = (step - warmup) / max(1.0, total - warmup)  # share of the way from the peak to the end
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "onecycle":
        return config.lr * (1 - done)
    if config.schedule == "step":
        passed = sum(step >= round(milestone * total) for milestone in config.milestones)
        return float(config.lr * config.step_factor**passed)
    return config.lr


def travel(config: FitConfig, steps_per_epoch: int) -> float:
    """How far a gradient of constant sign and size 1 moves a weight over the schedule: sum of lr / (1 - momentum)."""
    steps = range(config.epochs * steps_per_epoch)
    return sum(learning_rate(step, steps_per_epoch=steps_per_epoch, config=config) for step in steps) / (
        1 - config.momentum
    )


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.SGD:
    """SGD over all trainable parameters of the model, in one decayed and one undecayed group.

    Fused, so that a step can be refused by a flag on the device (``found_inf``); the momenta are there from the
    beginning, since a first step that is refused would leave memory that nobody has written to.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: dict[int, nn.Parameter] = {}  # a parameter shared by two modules is optimised once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen[id(parameter)] = parameter
                groups[_decays(module, name, config)].append(parameter)
    optimizer = torch.optim.SGD(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
            for decays, parameters in groups.items()
            if parameters
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    if config.momentum:
        for parameter in seen.values():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _decays(module: nn.Module, name: str, config: FitConfig) -> bool:
    return config.decay == "all" or not (isinstance(module, _BatchNorm) or name == "bias")
