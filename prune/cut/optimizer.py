"""An optimizer for the cut network that goes on where the one of the whole network was."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from netslim.prune.choose import Plan
from netslim.prune.cut.resize import OWN, fitting_layers, sliced, trimmed

Scheduler = TypeVar("Scheduler", bound=LRScheduler)


@overload
def carry(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan
) -> torch.optim.Optimizer: ...


@overload
def carry(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan, scheduler: Scheduler
) -> tuple[torch.optim.Optimizer, Scheduler]: ...


def carry(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    scheduler: LRScheduler | None = None,
) -> torch.optim.Optimizer | tuple[torch.optim.Optimizer, LRScheduler]:
    """Make the optimizer of `small = cut(model, plan)` with the state of the model's: momentum, moments, step counts.

    State of a parameter's shape is sliced as the parameter is; groups and their settings stay. The optimizer, the model
    and the scheduler are unchanged.

    A scheduler goes on stepping the optimizer that it was made for, and so the old one. Given here, it is carried too:
    the copy stands where it stands and steps the new optimizer. Where one was made for the optimizer and none is given,
    a warning says so. Hooks are not carried: a penalty on gammas no longer acts, until one of the small network's is
    attached to the new optimizer.

    Args: scheduler, of torch.optim.lr_scheduler, also one made of several.
    Returns: the optimizer, and with a scheduler both.
    Raises: ValueError if the plan is of another network, if the optimizer holds parameters that are not the model's, or
    state of another shape for one that is cut (as Adafactor's), or if the scheduler steps another optimizer.
    """
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("the scheduler steps another optimizer; carry the one that was made for this optimizer")
    layers = fitting_layers(model, plan)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = {part.name: part for part in plan.slices}
    surrounded = {around.name for around in plan.selections}
    memo: dict[int, object] = {}  # deepcopy finds here what stands for each parameter, and for each sliced state
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) not in names:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not the model's; "
                "carry the optimizer that trained this model"
            )
        name = names[id(parameter)]
        home, _, own = name.rpartition(".")
        kept = small.get_submodule(f"{home}.norm" if home in surrounded else home).get_parameter(own)
        memo[id(parameter)] = kept
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape != kept.shape:
                raise ValueError(
                    f"the optimizer's {key} of '{name}' is {tuple(value.shape)}, which the cut does not say how to "
                    "slice; make a new optimizer for the cut network"
                )
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                if home in layers and own in OWN:
                    memo[id(value)] = sliced(layers[home], own, value, parts[home])
                for trim in (trim for trim in plan.trims if trim.name == name):
                    whole = memo.get(id(value), value)
                    assert isinstance(whole, Tensor), "so it is put there"
                    memo[id(value)] = trimmed(whole, trim)
    carried = copy.deepcopy(optimizer, memo)
    if scheduler is not None:
        _Unchanged(carried)
        return carried, copy.deepcopy(scheduler, {**memo, id(optimizer): carried})
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        warnings.warn(
            "a scheduler was made for this optimizer and will not step the one that comes back; carry it too, by "
            "carry(..., scheduler=scheduler), or make a new one",
            stacklevel=2,
        )
    return carried


class _Unchanged(LRScheduler):
    """Changes no learning rate; to make one tells the optimizer that a scheduler counts on its steps."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]
