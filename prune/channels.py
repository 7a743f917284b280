"""The channel map: which gammas of a network can be removed, what goes with each, and why the others stay."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from netslim.prune import operations as ops
from netslim.prune.labels import Flow, Use
from netslim.prune.shadow import on_a_copy


@dataclass(frozen=True)
class Layer:
    """One BatchNorm of the map: gamma i belongs to its channel i, made by `producers` and read by `consumers`."""

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    prunable: tuple[bool, ...]
    """(width,): True = the channel can be removed with its gamma."""
    reasons: tuple[tuple[str, int], ...]
    """Why the other channels stay, each with the number of channels it holds."""

    @property
    def num_prunable(self) -> int:
        return sum(self.prunable)


@dataclass(frozen=True)
class Ends:
    """The channel labels at the two ends of a convolution, linear layer or BatchNorm; equal labels are one channel."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class ChannelMap:
    """Which producers, BatchNorm entries and consumers share a channel, in the order of execution.

    `layers` holds every BatchNorm, `modules` the labels of every layer with weights: removing gamma i of a BatchNorm
    removes, in all modules, each feature labelled `inputs[i]` or `outputs[i]` of that BatchNorm.
    """

    layers: tuple[Layer, ...]
    modules: tuple[Ends, ...]

    def prunable(self, model: nn.Module) -> dict[str, Tensor]:
        """Map each BatchNorm with a prunable channel to its mask: (width,) bool, True = prunable."""
        return {
            name: torch.tensor(self._by_name[name].prunable, device=gamma.device)
            for name, gamma in self.named_gammas(model).items()
        }

    def gammas(self, model: nn.Module) -> list[nn.Parameter]:
        """List the gammas that sparsity training should pull to zero: those of BatchNorms with a prunable channel.

        A gamma is whole, (width,), also where only some of its channels are prunable; `prunable` has the masks.
        """
        return list(self.named_gammas(model).values())

    def named_gammas(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Map the name of each BatchNorm with a prunable channel to its gamma; ValueError if the model differs."""
        found: dict[str, nn.Parameter] = {}
        for layer in self.layers:
            module = _submodule(model, layer.name)
            if not isinstance(module, ops.NORMALISING) or module.num_features != layer.width:
                raise ValueError(
                    f"the channel map is of another network: no BatchNorm of {layer.width} at '{layer.name}'"
                )
            if layer.num_prunable:
                found[layer.name] = module.weight
        return found

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def __str__(self) -> str:
        rows = [("BatchNorm", "width", "prunable", "made by -> read by", "why the others stay")]
        for layer in self.layers:
            path = f"{_few(layer.producers) or '?'} -> {_few(layer.consumers) or '?'}"
            why = "; ".join(f"{count}: {reason}" for reason, count in layer.reasons)
            rows.append((layer.name, str(layer.width), str(layer.num_prunable), path, why))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {width:>{widths[1]}}  {prunable:>{widths[2]}}  {path:<{widths[3]}}  {why}".rstrip()
            for name, width, prunable, path, why in rows
        ]
        total, all_channels = sum(x.num_prunable for x in self.layers), sum(x.width for x in self.layers)
        return "\n".join([*lines, f"{total} of {all_channels} channels are prunable"])


def map_channels(model: nn.Module, example: Tensor) -> ChannelMap:
    """Find out by torch.fx which channels belong together; the model is unchanged.

    Labels of channels flow through the network's graph in eval mode, so no architecture has to be known. A gamma is
    prunable exactly if its BatchNorm's input channel comes from one ungrouped convolution or linear layer and goes to
    this BatchNorm only, and the normalised channel is read by ungrouped convolutions and linear layers only, through
    operations that move data or leave zeros zero.

    Args: example (n, 3, height, width), on the model's device and in its dtype; only its first image is used.
    Raises: ValueError if torch.fx cannot trace the network, if the example does not fit, or if nothing is prunable.
    """
    if not any(isinstance(module, ops.NORMALISING) for module in model.modules()):
        raise ValueError("the network has no BatchNorm layer, so there is no gamma to slim by")
    if example.dim() < 2 or not example.numel():
        raise ValueError(f"an example of shape {tuple(example.shape)} is no batch of images (n, 3, height, width)")
    flow = on_a_copy(model, example[:1], _flow)
    layers = _layers(flow)
    if not any(layer.num_prunable for layer in layers):
        why = "; ".join(f"'{layer.name}': {_few([text for text, _ in layer.reasons])}" for layer in layers)
        raise ValueError(f"no channel of the network is prunable: {why}")
    return ChannelMap(layers, tuple(Ends(use.name, tuple(use.inputs), tuple(use.outputs)) for use in flow.uses))


class _Tracer(fx.Tracer):
    """Remembers in which module tracing stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return super().is_leaf_module(module, name) or ops.is_plain(module)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not in a finally: after an error the path shows where
        return result


def _flow(model: nn.Module, example: Tensor) -> Flow:
    graph = _trace(model)
    _refuse_unreached(model, graph)
    flow = Flow(model)
    flow.run(graph, example)
    return flow


def _trace(model: nn.Module) -> fx.Graph:
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    defaults = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
    tracer = _Tracer()
    try:
        return tracer.trace(model, concrete_args=defaults or None)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        place = f"module '{tracer.path[-1]}'" if tracer.path else "the network's own forward"
        what = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.fx cannot trace {place}: {what}; move branches and loops over tensor values "
            "out of forward, or into a function marked with torch.fx.wrap"
        ) from error


def _refuse_unreached(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse heads that only training runs: what they read is unknown, and a cut would break them."""
    reached = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    reached |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    missed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (ops.NORMALISING, *ops.PRODUCING)) and not reached & set(_and_parents(name))
    ]
    if missed:
        raise ValueError(
            f"in eval mode the network never calls {_few([repr(name) for name in missed])}, "
            "so what these read is unknown; build it without auxiliary heads and unused layers"
        )


def _layers(flow: Flow) -> tuple[Layer, ...]:
    producers: dict[int, Use] = {}
    readers: defaultdict[int, list[Use]] = defaultdict(list)
    for use in flow.uses:
        for label in use.outputs:
            producers[label] = use
        for label in use.inputs if use.normalises else dict.fromkeys(use.inputs):
            readers[label].append(use)
    found = []
    for norm in (use for use in flow.uses if use.normalises):
        sources, results = norm.inputs, norm.outputs
        why = [
            flow.frozen.get(source) or _why_not_cut(norm, producers[source], readers[source])
            or flow.frozen.get(result) or _why_not_read(readers[result])
            for source, result in zip(sources, results, strict=True)
        ]  # fmt: skip
        found.append(
            Layer(
                name=norm.name,
                width=len(results),
                producers=tuple(dict.fromkeys(producers[label].name for label in sources if label in producers)),
                consumers=tuple(dict.fromkeys(use.name for label in results for use in readers[label])),
                prunable=tuple(reason is None for reason in why),
                reasons=tuple(Counter(reason for reason in why if reason is not None).items()),
            )
        )
    return tuple(found)


def _why_not_cut(norm: Use, producer: Use, readers: Sequence[Use]) -> str | None:
    """Say why the channel before a BatchNorm has to stay."""
    if producer.normalises:
        return f"already normalised by BatchNorm '{producer.name}'"
    other = next((use for use in readers if use.name != norm.name), None)
    if other is not None:
        return (
            f"shared with BatchNorm '{other.name}'"
            if other.normalises
            else f"read before its BatchNorm by '{other.name}'"
        )
    if len(readers) > 1:
        return f"one channel of '{producer.name}' has several gammas"
    return None


def _why_not_read(readers: Sequence[Use]) -> str | None:
    """Say why the channel behind a BatchNorm has to stay."""
    if not readers:
        return "read by no layer"
    norm = next((use for use in readers if use.normalises), None)
    return f"normalised again by BatchNorm '{norm.name}'" if norm else None


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _few(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
