"""The graphs of a network: the one that evaluation runs, and the one of training where it calls more layers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from netslim.prune.map import operations as ops
from netslim.prune.map.layers import few

_REMEDY = "move branches and loops over tensor values out of its forward, or into a function marked with torch.fx.wrap"


@dataclass(frozen=True)
class Traces:
    """The graphs of one network, and the modules that they call without looking inside."""

    graphs: tuple[fx.Graph, ...]
    opaque: dict[str, str]
    """Module that torch.fx cannot trace -> what it said and what helps."""


def traces(model: nn.Module) -> Traces:
    """Trace the network as it evaluates, and as it trains if it has layers that only training calls.

    Leaves the model in eval mode. Raises: ValueError if torch.fx cannot trace its own forward, or if a layer is never
    called.
    """
    opaque: dict[str, str] = {}
    found = [trace(model.eval(), opaque)]
    if missed := _unreached(model, found):
        found.append(trace(model.train(), opaque))
        model.eval()
        missed = _unreached(model, found)
    if missed:
        raise ValueError(
            f"the network never calls {few([repr(name) for name in missed])}, neither in eval nor in training mode, "
            "so what these read is unknown; build it without unused layers"
        )
    return Traces(tuple(found), opaque)


def called_once(model: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """Name the modules that the graph calls, each just once, in the order of execution."""
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    times = Counter(calls)
    return {name: model.get_submodule(name) for name in calls if times[name] == 1}


def norms_after(model: nn.Module, graph: fx.Graph) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Map the name of each module to the BatchNorm that alone reads what it gives; both are called just once."""
    once = called_once(model, graph)
    found = {}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        norm = once.get(str(node.target))
        if not isinstance(norm, ops.NORMALISING) or norm.running_mean is None or not isinstance(before, fx.Node):
            continue
        if before.op == "call_module" and str(before.target) in once and len(before.users) == 1:
            found[str(before.target)] = norm
    return found


def rectified(model: nn.Module, graph: fx.Graph) -> set[nn.Module]:
    """Find the modules that are called just once and whose result a ReLU alone reads."""
    once = called_once(model, graph)
    found = set()
    for node in graph.nodes:
        reader = next(iter(node.users), None)
        if node.op != "call_module" or str(node.target) not in once or reader is None or len(node.users) > 1:
            continue
        module = model.get_submodule(str(reader.target)) if reader.op == "call_module" else None
        if reader.op.startswith("call_") and ops.name_of(reader, module) in ("relu", "relu6"):
            found.add(once[str(node.target)])
    return found


def readers_of_norms(model: nn.Module, graph: fx.Graph) -> dict[nn.modules.batchnorm._BatchNorm, list[nn.Module]]:
    """Find the layers that alone read a BatchNorm, at most through operations that a scale passes."""
    once, found = called_once(model, graph), {}
    for node in graph.nodes:
        norm = once.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, ops.NORMALISING):
            readers = _read_by(node, model, once)
            if readers is not None:
                found[norm] = readers
    return found


def _read_by(node: fx.Node, model: nn.Module, once: dict[str, nn.Module]) -> list[nn.Module] | None:
    found: list[nn.Module] = []
    for user in node.users:
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, ops.PRODUCING) and str(user.target) in once:
            found.append(module)
            continue
        name = "" if user.op == "output" else ops.name_of(user, module)
        if ops.reads_no_values(name):
            continue
        further = _read_by(user, model, once) if name in ops.HOMOGENEOUS else None
        if further is None:
            return None
        found += further
    return found


class _Tracer(fx.Tracer):
    """Looks into no opaque module, and remembers in which one tracing stopped."""

    def __init__(self, opaque: Collection[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.path: list[str] = []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name in self.opaque or super().is_leaf_module(module, name) or ops.is_plain(module)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):  # where a leaf cannot be called, its caller is at fault
            return super().call_module(m, forward, args, kwargs)
        self.path.append(name)
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not in a finally: after an error the path shows where
        return result


def trace(model: nn.Module, opaque: dict[str, str]) -> fx.Graph:
    """Trace the network in its present mode; add to the opaque modules where torch.fx stops, and start again."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    while True:  # at most once for each module
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(model, concrete_args=_defaults(model))
        except Exception as error:  # tracing runs the network's own code, which may raise anything
            what = str(error).strip().partition("\n")[0] or type(error).__name__
            if not tracer.path:
                raise ValueError(
                    f"torch.fx cannot trace the network's own forward, so nothing is prunable: {what}; {_REMEDY}"
                ) from error
            opaque[tracer.path[-1]] = f"torch.fx cannot trace '{tracer.path[-1]}': {what}; {_REMEDY}"
        for module, before in attributes:  # a proxy kept on a module would be there when it really runs
            module.__dict__.clear()
            module.__dict__.update(before)


def _defaults(model: nn.Module) -> dict[str, Any] | None:
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty} or None


def _unreached(model: nn.Module, found: Sequence[fx.Graph]) -> list[str]:
    """Name the layers with weights that no graph calls: what they read is unknown, and a cut would break them."""
    reached: set[nn.Module] = set()
    for node in (node for graph in found for node in graph.nodes):
        if node.op == "call_module":
            reached.update(model.get_submodule(str(node.target)).modules())
        elif node.op == "get_attr":
            reached.add(model.get_submodule(str(node.target).rpartition(".")[0]))
    return [name for name, layer in ops.layers_of(model).items() if layer not in reached]
