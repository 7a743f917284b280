"""The L1 penalty on BatchNorm scales that makes channels removable (Liu et al. 2017, eq. 1, arXiv 1708.06519)."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.base import plainly
from netslim.train.ranks import Fragment, whole

_INTERVAL = 5


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SparsityConfig:
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Lambda: weight of the L1 term on all prunable BatchNorm scales, per optimizer step."""
    method: Literal["subgradient", "proximal"] = "subgradient"
    """subgradient: lambda x sign(gamma) joins the gradient; proximal: soft threshold after the step, true zeros."""
    reconfigure_every: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Epochs, or a part of one, after which channels that have come to zero are removed while training goes on
    (PruneTrain, Lym et al. 2019, arXiv 1901.09290): it gets cheaper, and computes the same. They count in every ratio.
    0: never; None: 5 with proximal steps, where it costs no accuracy (docs/performance.md), but for engine.zero 3;
    else never."""
    reconfigure_below: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """|gamma| up to which a channel counts as zero then. Above 0 its removal changes the network, by as little."""

    def interval(self, engine: str) -> float:
        """Epochs between two looks for channels at zero, under an engine by its name (`Runtime.engine`); 0: no looks.

        Raises ValueError where the engine cannot have any.
        """
        if self.reconfigure_every is None:
            return _INTERVAL if self.method == "proximal" and engine != "zero3" else 0
        if self.reconfigure_every and engine == "zero3":
            raise ValueError(
                "sparsity.reconfigure_every needs whole gammas on every rank, which engine.zero 3 divides; "
                "use engine.zero 0, 1 or 2"
            )
        return self.reconfigure_every

    def __post_init__(self) -> None:
        if self.reconfigure_every and self.method == "subgradient" and not self.reconfigure_below:
            raise ValueError(
                "sparsity.reconfigure_every removes channels at zero, which the subgradient never reaches; "
                "use sparsity.method proximal, or say by sparsity.reconfigure_below what is near enough"
            )

    @property
    def unread(self) -> dict[str, str]:
        """The fields that nothing reads beside the others, and why."""
        return {} if self.interval("") else {"reconfigure_below": f"reconfigure_every is {self.reconfigure_every}"}


class GammaPenalty:
    """Adds the subgradient of ``weight * sum(|gamma|)``, or its proximal step, to an optimizer exactly once a step.

    ``attach`` hooks it into the optimizer's own ``step``, which runs after the gradients were summed over ranks and
    accumulation steps, unscaled and clipped, and not at all where a scaler skips the step. So nothing scales the
    penalty, and each rank does the same. Works with any torch optimizer, on its own, under DDP or Accelerate:

        penalty = GammaPenalty(model, weight=1e-4).attach(optimizer)

    A gamma that is frozen (``requires_grad``) at a step, or has no gradient in it, is left alone in that step.

    Arguments: the model, whose BatchNorm scales are found by type, or the gammas themselves; ``weight`` is lambda,
    at least 0; ``method`` as in ``SparsityConfig``. Raises ValueError where no gamma is trained or lambda is below 0.
    """

    def __init__(
        self,
        gammas: nn.Module | Sequence[nn.Parameter],
        weight: float,
        method: Literal["subgradient", "proximal"] = "subgradient",
    ) -> None:
        if isinstance(gammas, nn.Module):
            gammas = [module.weight for module in gammas.modules() if isinstance(module, _BatchNorm) and module.affine]
        self.gammas = list(gammas)
        self.weight = weight
        self.method = method
        if not any(gamma.requires_grad for gamma in self.gammas):
            raise ValueError("there is no trainable BatchNorm scale to penalise; use a network with BatchNorm layers")
        if not weight >= 0:
            raise ValueError(f"sparsity.weight is lambda and at least 0, not {weight}")

    def attach(self, optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment] | None = None) -> Self:
        """Hook the penalty into ``optimizer.step``; ``detach`` takes it out again.

        ``fragments``: what of the gammas this rank's optimizer steps; without them it holds the gammas themselves.
        Raises ValueError where the optimizer does not hold them all, or a penalty on one of them is attached already.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper hands its steps on to that one
        if not {id(gamma) for other in _attached(optimizer) for gamma in other.gammas}.isdisjoint(map(id, self.gammas)):
            raise ValueError(
                "the optimizer penalises these gammas already, and a second penalty would add to the first; detach "
                "that one, or make a new optimizer"
            )
        if fragments is None:
            fragments = [whole(gamma) for gamma in self.gammas]
            known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if not all(id(gamma) in known for gamma in self.gammas if gamma.requires_grad):
                raise ValueError("the optimizer does not hold all penalised gammas; build it from the same model")
        self._fragments: dict[int, list[Fragment]] = defaultdict(list)
        for fragment in fragments:
            self._fragments[id(fragment.owner)].append(fragment)
        if self.method == "subgradient":
            self._hook = optimizer.register_step_pre_hook(self._add_subgradient)
        else:
            self._hook = optimizer.register_step_post_hook(self._shrink)
        return self

    def detach(self) -> None:
        self._hook.remove()

    @torch.no_grad()
    def _add_subgradient(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A fused optimizer unscales inside its step: only then are the gradients still scaled here.
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        values, gradients = [], []
        for group in optimizer.param_groups:
            for fragment in self._of(group):
                assert fragment.owner.grad is not None, "it is stepped"
                values.append(fragment.of(fragment.owner.detach()))
                gradients.append(fragment.of(fragment.owner.grad))
        if not values:  # all are frozen; or ZeRO steps its partitions one by one, and this one holds no gamma
            return
        signs = list(torch._foreach_sign(values))
        if scale is not None:
            torch._foreach_mul_(signs, scale.to(signs[0].device))
        torch._foreach_add_(gradients, signs, alpha=self.weight)

    @torch.no_grad()
    def _shrink(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            gammas = [fragment.of(fragment.owner.detach()) for fragment in self._of(group)]
            if gammas:
                soft_threshold_(gammas, _threshold(self.weight, group, optimizer))

    def _of(self, group: dict[str, Any]) -> list[Fragment]:
        """The pieces of gammas that a parameter group of the optimizer steps now."""
        pieces = (piece for owner in group["params"] for piece in self._fragments.get(id(owner), ()))
        return [piece for piece in pieces if piece.is_stepped]


def _attached(optimizer: torch.optim.Optimizer) -> list[GammaPenalty]:
    """The penalties that are hooked into an optimizer."""
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, GammaPenalty)]


class BetaFade:
    """Draws the beta of a channel whose gamma is zero to zero as well, by the proximal step, so that nothing is left.

    Such a channel gives a constant, for which what normalises after it makes up, but not at padded borders: while beta
    is not zero the channel can't be removed without a trace. The gamma is that before the step, which every engine has.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def attach(self, optimizer: torch.optim.Optimizer, pieces: Sequence[tuple[Fragment, Tensor]]) -> Self:
        """Hook it into ``optimizer.step``; pieces of betas that this rank's optimizer steps, each with its gamma."""
        self._pieces: dict[int, list[tuple[Fragment, Tensor]]] = defaultdict(list)
        for fragment, gamma in pieces:
            self._pieces[id(fragment.owner)].append((fragment, gamma))
        self._idle: dict[int, list[tuple[Fragment, Tensor]]] = {}
        optimizer.register_step_pre_hook(self._look)
        optimizer.register_step_post_hook(self._shrink)
        return self

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for owner in (owner for group in optimizer.param_groups for owner in group["params"]):
            self._idle[id(owner)] = [
                (fragment, gamma.detach().narrow(0, fragment.offset, fragment.count) == 0)
                for fragment, gamma in self._pieces.get(id(owner), ())
                if fragment.is_stepped
            ]

    @torch.no_grad()
    def _shrink(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            pieces = [piece for owner in group["params"] for piece in self._idle[id(owner)]]
            betas = [fragment.of(fragment.owner.detach()).view(-1) for fragment, _ in pieces]
            if betas:
                shrunk = [beta.clone() for beta in betas]
                soft_threshold_(shrunk, _threshold(self.weight, group, optimizer))
                idle = [mask for _, mask in pieces]
                torch._foreach_copy_(betas, list(map(torch.where, idle, shrunk, betas)))


def _threshold(weight: float, group: dict[str, Any], optimizer: torch.optim.Optimizer) -> float | Tensor:
    """How far a proximal step moves what a parameter group of the optimizer holds.

    In the long run momentum moves a weight by lr / (1 - momentum) per unit of gradient. The threshold must be as far,
    or the balance with the loss would be that of a lambda (1 - momentum) times as large. It is 0 where a fused
    optimizer was told on the device to leave the weights alone (``found_inf``), and then stays on the device.
    """
    threshold = float(weight * group["lr"] / (1 - group.get("momentum", 0.0)))
    refused: Tensor | None = getattr(optimizer, "found_inf", None)
    return threshold if refused is None else threshold * (1 - refused)


def soft_threshold_(values: list[Tensor], threshold: float | Tensor) -> None:
    """Move every entry towards zero by ``threshold``, and to exactly zero where it is nearer than that, in place.

    The proximal operator of ``threshold * |x|`` (Parikh and Boyd 2014, section 6.5.2).
    """
    magnitudes = list(torch._foreach_abs(values))
    if isinstance(threshold, Tensor):
        torch._foreach_add_(magnitudes, -threshold)
    else:
        torch._foreach_sub_(magnitudes, threshold)
    torch._foreach_clamp_min_(magnitudes, 0.0)
    torch._foreach_mul_(magnitudes, list(torch._foreach_sign(values)))
    torch._foreach_copy_(values, magnitudes)


@torch.no_grad()
def gamma_summary(gammas: Sequence[Tensor]) -> dict[str, float]:
    """Median |gamma| and the shares below 1e-2 and 1e-3, over all channels."""
    magnitudes = torch.cat([gamma.detach().abs().flatten() for gamma in gammas])
    return {
        "gamma_median": magnitudes.median().item(),
        "gamma_below_1e-2": (magnitudes < 1e-2).float().mean().item(),
        "gamma_below_1e-3": (magnitudes < 1e-3).float().mean().item(),
    }


def describe_pull(gammas: Sequence[Tensor], weight: float, travel: float) -> tuple[str, bool]:
    """One line that says whether lambda can bring the gammas to zero in this schedule, and whether it is a warning.

    Frozen gammas do not count. ``travel`` is sum of lr / (1 - momentum) over the schedule, so that weight * travel, the
    *pull*, is the farthest that the penalty alone can move a gamma. The loss holds up the gammas that it needs, so that
    a pull as long as the median is the least that brings any to zero (measured: docs/lab.md). A pull below the median
    |gamma| leaves most gammas where they are: the global threshold then cuts channels that matter, and the accuracy
    after the cut falls to chance level.
    """
    trained = [gamma for gamma in gammas if gamma.requires_grad] or gammas
    pull, median = weight * travel, gamma_summary(trained)["gamma_median"]
    line = f"pull {pull:.3g} = lambda {weight:g} x sum of lr / (1 - momentum) {travel:.4g}; median |gamma| {median:.3g}"
    if weight == 0:
        return f"{line}: lambda 0 is no penalty, and brings no gamma to zero", False
    if pull >= median:
        times = f", by {pull / median:.1f} times the median" if median else ""
        return f"{line}: this lambda can bring gammas to zero in this schedule{times}", False
    least = _rounded_up(median / travel)
    return (
        f"{line}: this lambda cannot bring the gammas to zero in this schedule, so that pruning will cut channels that "
        f"matter; {least:g} is the least lambda that can, for the first of them, and several times that for many; or "
        "use more epochs, or a higher learning rate",
        True,
    )


def _rounded_up(value: float) -> float:
    """To two digits, and never to less: a lambda that is said to suffice has to."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(round(value / unit, 6)) * unit
