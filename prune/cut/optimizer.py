"""An optimizer for the cut network that goes on where the one of the whole network was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from netslim.prune.choose import Plan
from netslim.prune.cut.resize import OWN, fitting_layers, sliced, trimmed


def carry(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """Make the optimizer of `small = cut(model, plan)` with the state of the model's: momentum, moments, step counts.

    State of a parameter's shape is sliced as the parameter is; groups and their settings stay. Hooks, such as those of
    a penalty on gammas, are not carried: attach them again. The optimizer and the model are unchanged.

    Raises: ValueError if the plan is of another network, or if the optimizer holds parameters that are not the model's.
    """
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
        memo[id(parameter)] = small.get_submodule(f"{home}.norm" if home in surrounded else home).get_parameter(own)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                if home in layers and own in OWN:
                    memo[id(value)] = sliced(layers[home], own, value, parts[home])
                for trim in (trim for trim in plan.trims if trim.name == name):
                    whole = memo.get(id(value), value)
                    assert isinstance(whole, Tensor), "so it is put there"
                    memo[id(value)] = trimmed(whole, trim)
    return copy.deepcopy(optimizer, memo)
