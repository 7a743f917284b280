"""Channel labels: a network run on labels instead of numbers tells which values belong to which channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from netslim.prune import operations as ops

CONSTANT = 0  # the label of everything that is no channel


@dataclass(frozen=True)
class Use:
    """The one call of a convolution, linear layer or BatchNorm: the labels that it reads and makes."""

    name: str
    normalises: bool
    inputs: list[int]
    """Label of each input feature; CONSTANT where it has none that could be cut."""
    outputs: list[int]


@dataclass
class Flow:
    """Labels on their way through a traced network.

    Every value carries an int64 tensor of its own shape. It is *tight*: expanded (stride 0) along each dimension in
    which the labels do not vary, so labels of large images cost no memory and the varying dimensions can be read off.
    """

    model: nn.Module
    uses: list[Use] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=lambda: {CONSTANT: "a constant of the network"})
    """Label -> the first reason for which its channel has to stay."""
    num_labels: int = 1

    def run(self, graph: fx.Graph, example: Tensor) -> None:
        """Run the graph on a batch of one image; a ValueError names the node at which the network itself fails."""
        trouble = _troubled_modules(self.model, graph)
        modules = dict(self.model.named_modules())
        values: dict[fx.Node, Any] = {}
        labels: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            module = modules[str(node.target)] if node.op == "call_module" else None
            if node.op == "output":
                self.freeze(_labels_in(fx.node.map_arg(node.args, labels.__getitem__)), "network output")
                break
            values[node] = _evaluate(node, module, self.model, values, example)
            labels[node] = self._label(node, module, values, labels, trouble)

    def fresh(self, count: int) -> Tensor:
        """Make new labels, (count,) int64."""
        self.num_labels += count
        return torch.arange(self.num_labels - count, self.num_labels)

    def freeze(self, labels: Iterable[Tensor], reason: str) -> None:
        """Keep the channels of these labels for good; the first reason stays."""
        for tensor in labels:
            for label in _distinct(tensor):
                self.frozen.setdefault(label, reason)

    def _label(self, node: fx.Node, module: nn.Module | None, values: Any, labels: Any, trouble: dict[str, str]) -> Any:
        value = values[node]
        shapes = _tensors_in(value)
        if node.op == "placeholder" and shapes:
            made = _along(self.fresh(value.shape[1]), 1, value.shape)
            self.freeze([made], "network input")
            return made
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), labels.__getitem__)
        name = "" if node.op in ("placeholder", "get_attr") else ops.name_of(node, module)
        if not shapes:
            if not ops.reads_no_values(name):
                self.freeze(_labels_in((args, kwargs)), f"values read by '{_place(node)}'")
            return value
        if node.op == "get_attr":
            return _filled(value, torch.tensor(CONSTANT))
        if isinstance(module, (ops.NORMALISING, *ops.PRODUCING)):
            reason = trouble.get(str(node.target))
            return self._bind(str(node.target), module, _labels_in((args, kwargs)), value, reason)
        return self._through(node, module, name, args, kwargs, value)

    def _bind(self, name: str, module: nn.Module, read: list[Tensor], value: Tensor, reason: str | None) -> Tensor:
        """Let a layer with weights read its input's labels and make new ones for its output."""
        inputs = read[0]
        dim = inputs.dim() - 1 if isinstance(module, nn.Linear) else inputs.dim() - _num_trailing(module, inputs) - 1
        made = self.fresh(value.shape[dim])
        if _varying(inputs) <= {dim}:
            features = _line(inputs, dim)
        else:
            self.freeze([inputs], f"'{name}' reads several channels as one")
            features = torch.full((inputs.shape[dim],), CONSTANT)
        if reason:
            self.freeze([inputs, made], reason)
        self.uses.append(Use(name, isinstance(module, ops.NORMALISING), features.tolist(), made.tolist()))
        return _along(made, dim, value.shape)

    def _through(self, node: fx.Node, module: nn.Module | None, name: str, args: Any, kwargs: Any, value: Any) -> Any:
        """Follow labels through an operation without weights; what is not known to keep channels apart freezes them."""
        inputs = _labels_in((args, kwargs))
        if name == "getitem" and not isinstance(args[0], Tensor):
            return args[0][args[1]]
        why: str | None
        if name in ops.PASSING and isinstance(value, Tensor):
            return inputs[0]
        if name in ops.POOLING and isinstance(value, Tensor):
            made, why = _pooled(inputs[0], ops.POOLING[name], value.shape)
        elif name in ops.AVERAGING and isinstance(value, Tensor):
            made, why = _averaged(args, kwargs)
        elif name in ops.MOVING:
            made, why = _moved(node, module, name, args, kwargs, value)
        else:
            made, why = None, _unknown(name)
        if why is None:
            return made
        reason = f"{why} at '{_place(node)}'"
        joint = self.fresh(1)
        self.freeze([*inputs, joint], reason)
        if made is not None:
            return made
        return _filled(value, joint[0])


def _evaluate(node: fx.Node, module: nn.Module | None, model: nn.Module, values: Any, example: Tensor) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "placeholder":
        return _argument(node, args, example)
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        return getattr(model.get_submodule(owner), attribute)
    try:
        if module is not None:
            return module.forward(*args, **kwargs)  # not module(...): hooks are the user's and may record
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target), "fx: every other call is one of a function"
        return node.target(*args, **kwargs)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the network does not run on an example of shape {tuple(example.shape)}: "
            f"'{_place(node)}' says: {first_line}; give an example (n, 3, height, width) that it accepts"
        ) from error


def _argument(node: fx.Node, default: Any, example: Tensor) -> Any:
    """Give the network its example as the first argument and the defaults as all others."""
    if node is next(other for other in node.graph.nodes if other.op == "placeholder"):
        return example
    if default:
        return default[0]
    name = str(node.target)
    if name.startswith("*"):
        return {} if name.startswith("**") else ()
    raise ValueError(f"the network's input '{name}' has no default; wrap it in a module that takes one batch of images")


def _troubled_modules(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Name the layers that cannot be resized, with the reason."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (ops.NORMALISING, *ops.PRODUCING))}
    owners: dict[int, str] = {}
    trouble: dict[str, str] = {}
    for name, layer in layers.items():
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
        elif isinstance(layer, ops.CONVOLVING) and layer.groups > 1:
            trouble[name] = f"grouped convolution '{name}'"
    return trouble


def _moved(
    node: fx.Node, module: nn.Module | None, name: str, args: Any, kwargs: Any, value: Any
) -> tuple[Any, str | None]:
    """Execute the operation on the labels; say why if it would do something else once channels are gone."""
    try:
        made = ops.apply_to_labels(node, name, module, args, kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None, f"'{name}' with these arguments"
    made = map_aggregate(made, lambda t: _tight(t) if isinstance(t, Tensor) else t)
    before, after = _labels_in((args, kwargs)), _labels_in(made)
    if [t.shape for t in after] != [t.shape for t in _tensors_in(value)]:
        return None, f"'{name}' with these arguments"
    if any(len(_varying(t)) > 1 for t in (*before, *after)):
        return made, f"'{name}' lays channels over two dimensions"
    if name == "squeeze" and len(args) + len(kwargs) == 1:
        return made, "'squeeze' without a dimension (it would drop a single channel; use flatten(1))"
    if name in ops.RESHAPING and any(_fixes_channels(node, name, dim) for t in after for dim in _varying(t)):
        return made, f"the number of channels is written into '{name}' (use flatten(1) or -1)"
    if name in ops.CHOOSING and any(_distinct(t) != _distinct(before[0]) for t in after):
        return made, f"'{name}' chooses channels by position"
    if name == "getitem" and not _is_plain_index(args[1]):
        return made, "'getitem' chooses by a list or tensor"
    return made, None


def _fixes_channels(node: fx.Node, name: str, dim: int) -> bool:
    """Tell whether a view or reshape asks for a number, not a computed size, along this dimension of its result."""
    sizes: Any = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
    if name == "flatten" or isinstance(sizes, fx.Node):
        return False
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    return dim < len(sizes) and isinstance(sizes[dim], int) and sizes[dim] != -1


def _is_plain_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts)


def _pooled(labels: Tensor, num_dims: int, shape: torch.Size) -> tuple[Tensor | None, str | None]:
    kept = labels.dim() - num_dims
    if any(dim >= kept for dim in _varying(labels)):
        return None, "channels pooled together"
    for dim in range(kept, labels.dim()):
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(shape), None


def _averaged(args: Any, kwargs: Any) -> tuple[Tensor | None, str | None]:
    labels: Tensor = args[0] if args else kwargs["input"]
    dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    dims = range(labels.dim()) if dims is None else (dims,) if isinstance(dims, int) else dims
    gone = {dim % labels.dim() for dim in dims}
    if gone & _varying(labels):
        return None, "averaged over channels"
    for dim in sorted(gone, reverse=True):
        labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
    return labels, None


def _unknown(name: str) -> str:
    if name in ops.JOINING:
        return f"{ops.JOINING[name]} with another branch"
    if name in ops.NOT_ZERO_AT_ZERO:
        return f"operation '{name}' is not zero at zero"
    return f"operation '{name}' is not known to keep channels apart"


def _num_trailing(module: nn.Module, inputs: Tensor) -> int:
    """Count the spatial dimensions behind the channel's."""
    if isinstance(module, ops.CONVOLVING):
        return len(module.kernel_size)
    return inputs.dim() - 2  # BatchNorm: (n, channels, ...)


def _place(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    home = next(reversed(stack)) if stack else ""
    return f"{home}.{node.name}" if home else node.name


def _tight(labels: Tensor) -> Tensor:
    shape = labels.shape
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, min(1, labels.shape[dim]))
        if labels.shape[dim] > 1 and (labels.stride(dim) == 0 or torch.equal(labels, first.expand_as(labels))):
            labels = first
    return labels.expand(shape)


def _varying(labels: Tensor) -> set[int]:
    return {dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim) != 0}


def _line(labels: Tensor, dim: int) -> Tensor:
    """Read the labels along one dimension."""
    return labels[tuple(slice(None) if d == dim else 0 for d in range(labels.dim()))]


def _along(labels: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Lay a line of labels along one dimension of a value."""
    return labels.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _distinct(labels: Tensor) -> set[int]:
    for dim in set(range(labels.dim())) - _varying(labels):
        labels = labels.narrow(dim, 0, min(1, labels.shape[dim]))
    return set(labels.flatten().tolist())


def _filled(value: Any, label: Tensor) -> Any:
    """Give every tensor of a value one and the same label."""
    return map_aggregate(value, lambda leaf: label.expand(leaf.shape) if isinstance(leaf, Tensor) else leaf)


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


_labels_in = _tensors_in
