"""A network of somebody's cut, and compared with a masked one by code that owes nothing to netslim's own proof."""

import copy
import math
import tempfile
import time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import MappingKey, tree_leaves, tree_map_with_path
from zoo_networks import NORMS, Network

from netslim.prune import ChannelMap, Coupling, Plan, cut, load, make_plan, map_channels, save

RATIO = 0.5
TOLERANCE, SINGLE = 1e-9, 1e-4
"""Largest accepted difference in float64, and of networks that run in float32 alone, relative to max(1, the largest
value of an output)."""
DRAWING = {"DropPath", "StochasticDepth", "DropBlock2d", "PatchDropout"}
"""Modules that draw, besides torch's kinds of dropout."""


def called(model: nn.Module, example: Any) -> list[Tensor]:
    """Call a network; what it drops out by a function, and no module that could be switched off, it keeps."""
    torch.manual_seed(1)
    with patch.object(functional, "dropout", lambda values, *args, **kwargs: values):
        found = model(*example) if isinstance(example, tuple) else model(example)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def evaluating(model: nn.Module) -> nn.Module:
    return model.eval()


def training(model: nn.Module) -> nn.Module:
    """Switch to training all but BatchNorms and what draws: then a network is a function of its inputs."""
    for module in model.train().modules():
        draws = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in DRAWING
        if draws or isinstance(module, NORMS):
            module.eval()
    return model


MODES = {"eval": evaluating, "training": training}


def silenced(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy the network, with gamma and beta of the channels that the plan removes at 0."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for layer in plan.layers:
            gone = [channel for channel in range(layer.width) if channel not in set(layer.kept)]
            names = (f"{layer.name}.weight", f"{layer.name}.bias", layer.name, layer.shift)
            for name in names:
                if name in parameters:
                    parameters[name][gone] = 0
    return twin


def calibrate(model: nn.Module, plan: Plan, example: Any) -> None:
    """Give every BatchNorm random statistics near those of what it reads in the silenced network.

    Layer by layer, each behind the random statistics of those before it: otherwise their errors multiply, and deep
    networks end in outputs that hang on the last digit of an image, or are not finite.
    """
    twin = silenced(model, plan)
    seen: set[nn.Module] = set()

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        variance.clamp_min_(max(1e-3, 0.3 * float(variance.mean())))  # of a few places it may happen to be nearly zero
        norm.running_mean.copy_(mean + 0.1 * torch.randn(norm.num_features) * variance.sqrt())
        norm.running_var.copy_(variance * (torch.rand(norm.num_features) + 0.5))
        seen.add(norm)

    norms = {name: m for name, m in twin.named_modules() if isinstance(m, NORMS) and m.running_mean is not None}
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms.values()]
    with torch.no_grad():
        called(training(twin), example)  # with heads that only training runs
        for norm, hook in zip(norms.values(), hooks, strict=True):
            if norm in seen:
                hook.remove()
        called(twin.eval(), example)
        for name, norm in norms.items():
            model.get_submodule(name).running_mean.copy_(norm.running_mean)
            model.get_submodule(name).running_var.copy_(norm.running_var)


def widened(example: Any) -> Any:
    """Convert an example to float64, but for keypoints: torchvision takes those in float32 alone."""

    def one(path: Any, value: Any) -> Any:
        is_wide = isinstance(value, Tensor) and value.is_floating_point() and MappingKey("keypoints") not in path
        return value.double() if is_wide else value

    return tree_map_with_path(one, example)


def difference(want: list[Tensor], have: list[Tensor]) -> float:
    """Measure the largest difference relative to max(1, an output's largest value)."""
    assert want, "no outputs"
    assert [t.shape for t in want] == [t.shape for t in have], "outputs of other shapes"
    largest = 0.0
    for a, b in zip(want, have, strict=True):
        if a.numel():
            assert torch.isfinite(a).all(), "the masked network's outputs are not finite"
            found = float((a.double() - b.double()).abs().max() / max(1.0, float(a.double().abs().max())))
            largest = found if found > largest or math.isnan(found) else largest
    return largest


def effect(want: list[Tensor], whole: list[Tensor]) -> float:
    """Measure what the removed channels were to the outputs, so that equality without them says something."""
    if [t.shape for t in want] != [t.shape for t in whole]:  # as a detector finds other things
        return 1.0
    return difference(want, whole)


def spread(found: list[Tensor]) -> float | None:
    """Measure how much the two images differ to the network, relative to an output; None where nothing says."""
    shares = [
        float((t[0] - t[1]).abs().max() / t.abs().max().clamp_min(1e-300))
        for t in found
        if t.ndim and len(t) == 2 and t.is_floating_point()
    ]
    return min(shares, default=None)


def assert_trains(small: nn.Module, example: Any) -> None:
    """One backward pass in training mode, batches and all: every gradient is finite."""
    outputs = [output for output in called(small.train(), example) if output.requires_grad]
    loss = sum(output.square().mean() for output in outputs)
    assert isinstance(loss, Tensor), "no output has a gradient"
    loss.backward()
    for name, parameter in small.named_parameters():
        assert parameter.numel(), f"nothing is left of {name}"
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"


def assert_comes_back(network: Network, small: nn.Module, plan: Plan, example: Any) -> None:
    """Save and load it: the same tensors and the same outputs, bit for bit."""
    with tempfile.TemporaryDirectory() as directory:
        save(small, plan, directory)
        back = load(directory, build=lambda: network.build(seed=5))
    state = small.state_dict()
    assert list(state) == list(back.state_dict()), "other keys after loading"
    assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items()), (
        "other tensors after loading"
    )
    with torch.no_grad():
        outputs = zip(called(small.eval(), example), called(back.eval(), example), strict=True)
        assert all(torch.equal(a, b) for a, b in outputs), "other outputs after loading"


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def compare(
    model: nn.Module, small: nn.Module, plan: Plan, example: Any, kind: torch.dtype, found: dict[str, Any]
) -> None:
    """Compare the cut network with the masked one in both modes, and that with the whole one."""
    twin, narrow = silenced(model, plan).to(kind), copy.deepcopy(small).to(kind)
    for mode, switch in MODES.items():
        found["at"] = f"compare in {mode}"
        with torch.no_grad():
            want = called(switch(twin), example)
            found[mode] = difference(want, called(switch(narrow), example))
            found[f"effect in {mode}"] = effect(want, called(switch(copy.deepcopy(model).to(kind)), example))
        if mode == "eval":
            found["spread"] = spread(want)
            found["double"] = all(t.dtype == torch.float64 for t in want if t.is_floating_point())


def measured(network: Network, coupling: Coupling, found: dict[str, Any]) -> dict[str, Any]:
    """Map, plan and cut a network, compare, train and save it; what is found is there as far as it went on an error."""
    model = network.build()
    example = network.example(model)
    found["at"] = "map"
    started = time.process_time()
    try:
        channels: ChannelMap = map_channels(model, example, coupling)
    except ValueError as error:
        if "no channel of the network is prunable" not in str(error):
            raise
        found.update(held=str(error), at="done", removable=0, gone=0.0, map=time.process_time() - started)
        return found
    found["map"] = time.process_time() - started
    found["removable"] = sum(sum(layer.removable(coupling)) for layer in channels.layers)
    found["channels"] = sum(layer.width for layer in channels.layers)
    found["why"] = channels.kept_by(coupling)
    found["at"] = "plan"
    started = time.process_time()
    plan = make_plan(channels.named_gammas(model, coupling), channels, ratio=RATIO, coupling=coupling)
    found["plan"] = time.process_time() - started
    found["removed"] = plan.num_removed
    found["at"] = "calibrate"
    calibrate(model, plan, example)
    found["at"] = "cut"
    started = time.process_time()
    small = cut(model, plan)
    found["cut"] = time.process_time() - started
    found["gone"] = 1 - num_params(small) / num_params(model)
    try:
        compare(model, small, plan, widened(example), torch.float64, found)
    except RuntimeError as error:
        if "expected scalar type" not in str(error):
            raise
        found["single"] = True  # it converts to float32 itself
        compare(model, small, plan, example, torch.float32, found)
    found["at"] = "backward"
    assert_trains(copy.deepcopy(small), example)
    found["at"] = "save and load"
    assert_comes_back(network, small, plan, example)
    found["at"] = "done"
    return found


def is_exact(found: dict[str, Any]) -> bool:
    """Tell whether a cut network equals the masked one in both modes."""
    tolerance = SINGLE if found.get("single") else TOLERANCE
    return all(found.get(mode, 1.0) <= tolerance for mode in MODES)


def assert_exact(found: dict[str, Any]) -> None:
    """What a test asks of the figures: equal to the masked network in both modes, and everything went to its end."""
    assert found["at"] == "done"
    assert "held" in found or is_exact(found), found
