"""One node of a graph, run on an example: what it gives, and where in the network it stands.

Shapes of what the commonest operations make are computed here: torch's meta device takes up to a millisecond for each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from netslim.prune.map import operations as ops


def run_node(node: fx.Node, module: nn.Module | None, model: nn.Module, values: Any, example: Tensor) -> Any:
    """Give the value of a node, of those before it; a ValueError names it where the network itself fails there."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "placeholder":
        return _argument(node, args, example)
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        return getattr(model.get_submodule(owner), attribute)
    if (known := _shaped(node, module, args, kwargs)) is not None:
        return known
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
            f"'{place_of(node)}' says: {first_line}; give an example (n, 3, height, width) that it accepts"
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


def place_of(node: fx.Node) -> str:
    """Name a node for a message: the module that it calls, or the operation with the module around it."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    home = next(reversed(stack)) if stack else ""
    return f"{home}.{node.name}" if home else node.name


def _shaped(node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Tensor | None:
    """Make a value without numbers for a node that has such inputs; None where torch has to be asked."""
    if not args or not isinstance(args[0], Tensor) or not args[0].is_meta or node.op in ("placeholder", "get_attr"):
        return None
    x = args[0]
    if module is not None and isinstance(module, ops.WEIGHTED):
        shape = _of_layer(module, x) if ops.is_plain(module) else None
    elif type(module) is nn.AdaptiveAvgPool2d and isinstance(module.output_size, tuple) and x.dim() == 4:
        shape = (*x.shape[:2], *(new or old for new, old in zip(module.output_size, x.shape[2:], strict=True)))
    else:
        name = ops.name_of(node, module)
        alike = name in ops.PASSING or (name in ops.JOINING and _match(x, args, kwargs))
        shape = tuple(x.shape) if alike else None
    return None if shape is None else x if shape == x.shape else x.new_empty(shape)


def _of_layer(layer: nn.Module, x: Tensor) -> tuple[int, ...] | None:
    """Compute the shape that a plain layer makes; None where it takes more than arithmetic, or does not fit."""
    num_inputs, num_outputs = ops.widths(layer)
    if isinstance(layer, nn.Linear):
        return (*x.shape[:-1], num_outputs) if x.dim() > 1 and x.shape[-1] == num_inputs else None
    if x.dim() < 2 or x.shape[1] != num_inputs:
        return None
    if isinstance(layer, ops.NORMALISING):
        return tuple(x.shape)
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str) or x.dim() != 4:
        return None
    spans = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    sizes = [(size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, step in spans]
    return (x.shape[0], num_outputs, *sizes) if min(sizes) > 0 else None


def _match(x: Tensor, args: Any, kwargs: Any) -> bool:
    """Tell whether a sum or product is one of two values of the same shape and kind."""
    other = args[1] if len(args) == 2 and not kwargs else None
    return isinstance(other, Tensor) and other.is_meta and other.shape == x.shape and other.dtype == x.dtype
