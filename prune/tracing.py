"""The graphs of a network: the one that evaluation runs, and the one of training where it calls more layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from netslim.prune import operations as ops


def graphs(model: nn.Module) -> list[fx.Graph]:
    """Trace the network as it evaluates, and as it trains if it has layers that only training calls.

    Leaves the model in eval mode. Raises: ValueError if torch.fx cannot trace it, or if a layer is never called.
    """
    found = [trace(model.eval())]
    if _unreached(model, found):
        found.append(trace(model.train()))
        model.eval()
    missed = _unreached(model, found)
    if missed:
        raise ValueError(
            f"the network never calls {few([repr(name) for name in missed])}, neither in eval nor in training mode, "
            "so what these read is unknown; build it without unused layers"
        )
    return found


def few(names: Sequence[str], most: int = 3) -> str:
    """List the first names and say how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


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


def trace(model: nn.Module) -> fx.Graph:
    """Trace the network in its present mode; ValueError naming the module where torch.fx cannot."""
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


def _unreached(model: nn.Module, found: Sequence[fx.Graph]) -> list[str]:
    """Name the layers with weights that no graph calls: what they read is unknown, and a cut would break them."""
    nodes = [node for graph in found for node in graph.nodes]
    reached = {str(node.target) for node in nodes if node.op == "call_module"}
    reached |= {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (ops.NORMALISING, *ops.PRODUCING)) and not reached & set(_and_parents(name))
    ]


def _and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
