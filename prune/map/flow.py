"""A network run on labels instead of numbers tells which values belong to which channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from netslim.prune.map import operations as ops
from netslim.prune.map.classes import CONSTANT, UNNORMALISED, Classes, along, line, varying
from netslim.prune.map.moves import Count, Moves, leaves, sizes
from netslim.prune.map.running import place_of, run_node
from netslim.prune.map.values import averaged, filling, joined, padded, pooled, shifted


@dataclass(frozen=True)
class Use:
    """The first call of a convolution, linear layer or BatchNorm: the labels that it reads and makes."""

    name: str
    kind: str
    normalises: bool
    inputs: Tensor  # (features,), CONSTANT where there is none that could be cut
    outputs: Tensor  # (features,)


class Flow:
    """Labels on their way through a traced network.

    Every value carries an int64 tensor of its own shape. It is *tight*: expanded (stride 0) along each dimension in
    which the labels do not vary, so labels of large images cost no memory and the varying dimensions can be read off.
    """

    def __init__(self, model: nn.Module, opaque: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.opaque = opaque or {}
        """Module that is called without a look inside -> why."""
        self.classes = Classes()
        self.uses: dict[str, Use] = {}
        self.trouble: dict[str, str] = {}
        """Layer with weights -> why it cannot be resized."""
        self._moves = Moves(self.classes)

    def run(self, graph: fx.Graph, example: Tensor) -> None:
        """Run a graph on a batch of one image; a ValueError names the node at which the network itself fails.

        Several graphs of one model may be run: what holds in any of them holds.
        """
        self.trouble |= _troubled_modules(self.model, graph)
        modules = dict(self.model.named_modules())
        values: dict[fx.Node, Any] = {}
        labels: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            module = modules[str(node.target)] if node.op == "call_module" else None
            if node.op == "output":
                self._freeze(fx.node.map_arg(node.args, labels.__getitem__), "network output")
                break
            values[node] = run_node(node, module, self.model, values, example)
            self._keep_hidden(node, module)
            labels[node] = self._label(node, module, values[node], labels)
        self._moves.settle()

    def _keep_hidden(self, node: fx.Node, module: nn.Module | None) -> None:
        """Keep the layers that a node uses without calling them: what becomes of their channels is not seen."""
        name = str(node.target)
        if node.op == "get_attr":
            owner = name.rpartition(".")[0]
            layer = self.model.get_submodule(owner)
            if isinstance(layer, ops.WEIGHTED):
                self._keep(owner, layer, self.trouble[owner])
        if module is None or (name not in self.opaque and not _is_whole(module)):
            return
        inside = {id(part) for part in module.modules()}
        weights = {id(parameter) for parameter in module.parameters()}
        why = self.opaque.get(name, f"inside '{name}', which is not known to keep channels apart")
        for inner, layer in ops.layers_of(self.model).items():
            if id(layer) in inside or any(id(own) in weights for own in layer.parameters(recurse=False)):
                self._keep(inner, layer, why)

    def _keep(self, name: str, layer: nn.Module, why: str) -> None:
        self.trouble.setdefault(name, why)
        ends = [self.classes.fresh(width, UNNORMALISED) for width in ops.widths(layer)]
        use = self.uses.setdefault(name, _use(name, layer, *ends))
        self._freeze((use.inputs, use.outputs), why)

    def _freeze(self, value: Any, reason: str) -> None:
        for tensor in leaves(value, Tensor):
            self.classes.freeze(tensor, reason)
        for count in leaves(value, Count):
            self.classes.freeze(count.labels, reason)

    def _label(self, node: fx.Node, module: nn.Module | None, value: Any, labels: Any) -> Any:
        shapes = leaves(value, Tensor)
        if node.op == "placeholder" and shapes:
            made = self._channels_of(value)
            self._freeze(made, "network input")
            return made
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), labels.__getitem__)
        name = "" if node.op in ("placeholder", "get_attr") else ops.name_of(node, module)
        if module is not None and (why := self.opaque.get(str(node.target))):
            return self._opaque((args, kwargs), value, why)
        if not shapes:
            return self._number(node, name, args, kwargs, value)
        if node.op == "get_attr":
            return _filled(value, torch.tensor(CONSTANT, device="cpu"))
        if isinstance(module, ops.WEIGHTED):
            return self._bind(str(node.target), module, leaves((args, kwargs), Tensor)[0], value)
        return self._through(node, module, name, args, kwargs, value)

    def _number(self, node: fx.Node, name: str, args: Any, kwargs: Any, value: Any) -> Any:
        """Follow numbers of channels through arithmetic."""
        if name in ("size", "getattr shape") and isinstance(args[0], Tensor):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None) if name == "size" else None
            return sizes(args[0]) if dim is None else sizes(args[0])[dim]
        if ops.reads_no_values(name):
            return value
        if node.target in ops.COUNTING and not leaves((args, kwargs), Tensor):
            return node.target(*args, **kwargs)
        self._freeze((args, kwargs), f"values read by '{place_of(node)}'")
        return value

    def _bind(self, name: str, module: nn.Module, inputs: Tensor, value: Tensor) -> Tensor:
        """Let a layer with weights read its input's labels and make new ones for its output."""
        dim = inputs.dim() - 1 if isinstance(module, nn.Linear) else inputs.dim() - _num_trailing(module, inputs) - 1
        if varying(inputs) <= {dim}:
            features = line(inputs, dim).clone()
        else:
            self._freeze(inputs, f"'{name}' reads several channels as one")
            features = torch.full((inputs.shape[dim],), CONSTANT, device="cpu")
        outputs = self._made(name, module, features, value.shape[dim])
        if name in self.trouble:
            self._freeze((features, outputs), self.trouble[name])
        first = self.uses.setdefault(name, _use(name, module, features, outputs))
        if first.outputs is not outputs:  # in another graph, or once more in this one
            self.classes.join(first.inputs, features)
            self.classes.join(first.outputs, outputs)
        return along(outputs, dim, value.shape)

    def _made(self, name: str, module: nn.Module, features: Tensor, count: int) -> Tensor:
        """Make the labels of a layer's output (count,), and bind what its groups bind."""
        classes = self.classes
        if isinstance(module, ops.NORMALISING):
            return classes.fresh(count)  # zero once gamma and beta are
        groups = module.groups if isinstance(module, ops.CONVOLVING) else 1
        if isinstance(module, ops.CONVOLVING) and groups == module.in_channels and groups > 1:
            sources = features.repeat_interleave(count // groups)
            bias = classes.cause(f"'{name}' adds a bias") if module.bias is not None else 0
            made = classes.fresh(count, np.where(classes.raw(sources) > 0, classes.raw(sources), bias))
            classes.join(sources, made)
            return made
        classes.read(features, name)
        made = classes.fresh(count, UNNORMALISED)
        if groups > 1:  # the groups stay, and stay equal
            for ends in (features, made):
                parts = ends.view(groups, -1)
                classes.join(parts, parts[:1].expand_as(parts))
        return made

    def _through(self, node: fx.Node, module: nn.Module | None, name: str, args: Any, kwargs: Any, value: Any) -> Any:
        """Follow labels through an operation without weights; what is not known to keep channels apart freezes them."""
        if name == "getitem" and not isinstance(args[0], Tensor):
            return args[0][args[1]]
        made, why = self._followed(node, module, name, args, kwargs, value)
        if why is None:
            return made
        mixed = self._mixed((args, kwargs), value, f"{why} at '{place_of(node)}'")
        return mixed if made is None else made

    def _followed(
        self, node: fx.Node, module: nn.Module | None, name: str, args: Any, kwargs: Any, value: Any
    ) -> tuple[Any, str | None]:
        """Label the value of an operation without weights, or say why its channels cannot be followed."""
        unknown = f"operation '{name}' is not known to keep channels apart"
        if name in ops.MOVING:
            return self._moves.move(node, module, name, args, kwargs, value)
        if name in ops.JOINING and isinstance(value, Tensor):
            return joined(self.classes, name, args, kwargs, value, place_of(node))
        inputs: list[Tensor] = leaves((args, kwargs), Tensor)
        if not isinstance(value, Tensor) or len(inputs) != 1 or leaves((args, kwargs), Count):
            return None, unknown
        (labels,) = inputs
        if name in ops.PASSING or name in ops.SHIFTING or name in ops.LIMITING:
            as_zero = ops.keeps_zero(node, name, module, args, kwargs)
            return labels if as_zero else shifted(self.classes, labels, name, place_of(node)), None
        if name in ops.POOLING:
            return pooled(labels, ops.POOLING[name], value.shape)
        if name == "interpolate":
            return pooled(labels, labels.dim() - 2, value.shape)
        if name in ops.AVERAGING:
            return averaged(name, args, kwargs)
        if name == "pad":
            amounts, fill = filling(module, args, kwargs)
            made, why = padded(labels, amounts, fill, value.shape)
            return shifted(self.classes, made, name, place_of(node)) if made is not None and fill else made, why
        if name == "channel_shuffle":
            groups: Any = module.groups if module is not None else kwargs.get("groups", args[-1])
            return self._moves.shuffle(labels, groups)
        if isinstance(module, nn.PReLU):
            return None, "a slope per channel"
        return None, unknown

    def _opaque(self, inputs: Any, value: Any, why: str) -> Any:
        """Keep what goes into an opaque module and what comes out; so that what meets that stays for this reason."""
        self._freeze(inputs, why)
        made = map_aggregate(value, lambda leaf: self._channels_of(leaf) if isinstance(leaf, Tensor) else leaf)
        self._freeze(made, why)
        return made

    def _channels_of(self, value: Tensor) -> Tensor:
        """Make labels for the channels of a value (n, channels, ...)."""
        if value.dim() < 2:
            return self.classes.fresh(1, UNNORMALISED)[0].expand(value.shape)
        return along(self.classes.fresh(value.shape[1], UNNORMALISED), 1, value.shape)

    def _mixed(self, inputs: Any, value: Any, why: str) -> Any:
        """Keep all that goes into an operation and all that comes out of it."""
        joint = self.classes.fresh(1, UNNORMALISED)
        self._freeze((inputs, joint), why)
        return _filled(value, joint[0])


def _is_whole(module: nn.Module) -> bool:
    """Tell whether a module that is called holds others, which the graph then does not show."""
    return not isinstance(module, ops.WEIGHTED) and next(module.children(), None) is not None


def _use(name: str, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> Use:
    return Use(name, type(layer).__name__, isinstance(layer, ops.NORMALISING), inputs, outputs)


def _troubled_modules(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Name the layers that cannot be resized, with the reason."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    owners: dict[int, str] = {}
    trouble: dict[str, str] = {}
    for name, layer in ops.layers_of(model).items():
        own = dict(layer.named_parameters(recurse=False))
        twins = [owners.setdefault(id(parameter), name) for parameter in own.values()]
        others = [other for other in twins if other != name]
        if others:
            trouble[name] = f"'{name}' and '{others[0]}' share a parameter"
            trouble.setdefault(others[0], trouble[name])
        if calls[name] > 1:
            trouble[name] = f"module used more than once '{name}'"
        elif name in read:
            trouble[name] = f"a parameter of '{name}' is read outside it"
        elif isinstance(layer, ops.NORMALISING) and not layer.affine:
            trouble[name] = f"BatchNorm '{name}' has no gamma (affine=False)"
        elif not ops.is_plain(layer) or not {"weight"} <= own.keys() <= {"weight", "bias"}:
            trouble[name] = f"'{name}' computes its weight from other tensors"
        elif isinstance(layer, ops.CONVOLVING) and layer.groups > 1 and layer.transposed:
            trouble[name] = f"grouped transposed convolution '{name}'"
    return trouble


def _num_trailing(module: nn.Module, inputs: Tensor) -> int:
    """Count the spatial dimensions behind the channel's."""
    if isinstance(module, ops.CONVOLVING):
        return len(module.kernel_size)
    return inputs.dim() - 2  # BatchNorm: (n, channels, ...)


def _filled(value: Any, label: Tensor) -> Any:
    """Give every tensor of a value one and the same label."""
    return map_aggregate(value, lambda leaf: label.expand(leaf.shape) if isinstance(leaf, Tensor) else leaf)
