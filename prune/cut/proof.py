"""The proof: the cut network computes what the masked one does, in every mode."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from netslim.prune.choose import Plan
from netslim.prune.cut.surgery import masked
from netslim.prune.record import (
    Example,
    call,
    line_of_traceback,
    moved,
    name_of,
    replica,
    results_of,
    trains_alike,
    untouched,
    words,
)

TOLERANCE = 1e-5
"""Largest accepted difference between the cut and the masked network, relative to max(1, largest |logit|)."""
TOLERANCE_SINGLE = 1e-4
"""The same where a network cannot run in float64, as one that converts to float32 itself: rounding is in it."""


Run = Callable[[nn.Module, Example], list[Tensor]]


def largest_difference(model: nn.Module, small: nn.Module, plan: Plan, example: Example) -> float:
    """Measure max |small - masked(model)| over all outputs, relative to max(1, max |masked(model)|).

    In eval mode, and in training mode too if that calls other functions: then without dropout, with random numbers
    that are the same for both, and with BatchNorm in eval mode. In float64, so that rounding cannot hide a wrong
    channel; in the network's own precision where it does not run in that.

    Args: example, as the network is called; its device is where the two copies run.
    """
    return _measured(model, small, plan, example)[0]


def _measured(model: nn.Module, small: nn.Module, plan: Plan, example: Example) -> tuple[float, bool]:
    """Give the largest difference, and whether it is one in float64."""
    runs: list[Run] = [_evaluated]
    if not trains_alike(model, example):
        runs.append(_trained)
    with untouched(model):  # the copies have its hooks
        return _compared(masked(model, plan), small, example, runs)


def _compared(twin: nn.Module, small: nn.Module, example: Example, runs: Sequence[Run]) -> tuple[float, bool]:
    differences, is_double = [0.0], True
    for run in runs:
        try:
            want = run(replica(twin, {}).to(dtype=torch.float64), moved(example, dtype=torch.float64))
            have = run(replica(small, {}).to(dtype=torch.float64), moved(example, dtype=torch.float64))
        except Exception:  # whatever it is: its own precision decides, and that error is the user's
            is_double = False
            try:
                want = run(replica(twin, {}), example)
            except Exception:
                if run is _trained:  # the map has said so
                    continue
                raise
            have = _run(run, replica(small, {}), example)
        differences.append(relative_difference(have, want))
    return max(differences), is_double


def _run(run: Run, small: nn.Module, example: Example) -> list[Tensor]:
    """Run a cut network; RuntimeError, with the line, where its code does not bear the cut."""
    try:
        return run(small, example)
    except Exception as error:  # it runs the network's own code, which may raise anything
        where = line_of_traceback(error)
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(f"the cut network does not run{' at ' * bool(where)}{where}: {what}") from error


def prove(model: nn.Module, small: nn.Module, plan: Plan, example: Example) -> float:
    """Return `largest_difference`, or raise RuntimeError where it exceeds the tolerance: then the cut is wrong.

    The tolerance is 1e-5, and 1e-4 for networks that do not run in float64.

    Raises: ValueError where the network's own outputs are NaN or infinite, so that there is nothing to compare with.
    """
    return proof_of(model, small, plan, example)[0]


def proof_of(model: nn.Module, small: nn.Module, plan: Plan, example: Example) -> tuple[float, bool]:
    """Prove as `prove` does; gives the difference, and whether both networks ran in float64 for it."""
    difference, is_double = _measured(model, small, plan, example)
    tolerance = TOLERANCE if is_double else TOLERANCE_SINGLE
    if math.isinf(difference) and not _is_finite(model, masked(model, plan), example):
        raise ValueError(
            "the network's outputs are NaN or infinite, so no cut can be proved: its weights are damaged, or training "
            "diverged; train again with a lower learning rate"
        )
    if not difference <= tolerance:
        raise RuntimeError(
            f"the cut network differs from the masked one by {difference:.2g}, more than {tolerance:g}: "
            "the network does something that its channel map does not show; please report it with the network"
        )
    return difference, is_double


def relative_difference(have: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Measure max |have - want| over all tensors, relative to max(1, max |want|); infinite where one is not finite.

    Raises: RuntimeError if there is nothing to compare, or shapes differ.
    """
    if not want or [t.shape for t in want] != [t.shape for t in have]:
        raise RuntimeError("the network's outputs have other shapes than the original's")
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(have, want, strict=True) if a.numel()]
    scale = max([1.0, *(b.abs().max().item() for _, b in pairs)])
    # against infinite or NaN logits nothing can be proved
    differences = [torch.nan_to_num(a - b, nan=math.inf, posinf=math.inf, neginf=-math.inf) for a, b in pairs]
    largest = max([0.0, *(difference.abs().max().item() for difference in differences)])
    return largest / scale if math.isfinite(scale) else math.inf


def _is_finite(model: nn.Module, twin: nn.Module, example: Example) -> bool:
    with untouched(model):
        return all(bool(torch.isfinite(output).all()) for output in _evaluated(twin, example))


def _evaluated(model: nn.Module, example: Example) -> list[Tensor]:
    return _results(model.eval(), example)


def _trained(model: nn.Module, example: Example) -> list[Tensor]:
    for module in model.train().modules():
        if "running_mean" in module._buffers:
            module.eval()
    return _results(model, example)


@torch.no_grad()
def _results(model: nn.Module, example: Example) -> list[Tensor]:
    """Run a network on random numbers that are the same for all; `untouched` puts their states back."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with _Still():
        return results_of(call(model, example))


class _Still(TorchFunctionMode):
    """Takes out of a run what is drawn for each channel: two networks of different widths would differ."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if name in _DROPPING:
            return args[0] if args else kwargs["input"]
        result = func(*args, **kwargs)
        return result.fill_(0.5) if name in _DRAWING and isinstance(result, Tensor) else result


_DROPPING = words("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
_DRAWING = words("rand randn rand_like randn_like bernoulli normal uniform exponential")
