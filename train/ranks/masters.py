"""The float32 weights that the optimizer steps, and its state for them, whichever engine divides them among ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """The piece of a parameter that this rank's optimizer steps: all of it, or with ZeRO a run of a flat partition."""

    owner: Tensor
    """What the optimizer holds: the parameter itself, or the partition."""
    start: int
    """First entry of the piece in the owner, flattened."""
    count: int
    offset: int
    """Its first entry in the parameter, flattened."""
    parameter: nn.Parameter
    """Which it is a piece of."""

    @property
    def is_stepped(self) -> bool:
        """Whether the optimizer's next step moves it: what is frozen meanwhile, or has no gradient, stays."""
        return self.parameter.requires_grad and self.owner.grad is not None

    def of(self, tensor: Tensor) -> Tensor:
        """View the piece in a tensor of the owner's shape: its values, its gradient, its momentum."""
        if self.count == tensor.numel():
            return tensor
        return tensor.view(-1).narrow(0, self.start, self.count)


def whole(parameter: nn.Parameter) -> Fragment:
    return Fragment(parameter, 0, parameter.numel(), 0, parameter)


def zero_fragment(parameter: nn.Parameter, optimizer: object, rank: int) -> Fragment | None:
    """Find a parameter's piece in DeepSpeed's ZeRO optimizer; None where other ranks have all of it."""
    positions = getattr(optimizer, "grad_position", None)
    if positions is not None and hasattr(parameter, "ds_numel"):  # stage 3: parameters are divided each by itself
        group, start, size = positions[optimizer.get_param_id(parameter)]  # type: ignore[attr-defined]
        offset = rank * size
        count = min(size, parameter.ds_numel - offset)
        owner = optimizer.fp32_partitioned_groups_flat[group]  # type: ignore[attr-defined]
        return Fragment(owner, start, count, offset, parameter) if count > 0 else None
    piece = parameter._hp_mapping  # type: ignore[attr-defined]  # stages 1 and 2: partitions run over parameters
    if piece is None:
        return None
    owner = optimizer.single_partition_of_fp32_groups[piece.param_group_index]  # type: ignore[attr-defined]
    address = piece.hp_fragment_address
    return Fragment(owner, address.start, address.numel, piece.lp_fragment_address.start, parameter)


class Masters:
    """Reads and writes whole weights and momenta, by the names of the parameters; every rank calls every method."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        fragments: Mapping[str, Fragment | None],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        sum_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.shapes, self._fragments, self._optimizer, self._device = shapes, fragments, optimizer, device
        self._sum_over_ranks = sum_over_ranks
        """None: every rank has all of every parameter."""

    def fragment_of(self, name: str) -> Fragment | None:
        """The piece of this parameter that this rank steps; None where there is none."""
        return self._fragments[name]

    def fragments_of(self, names: Sequence[str]) -> list[Fragment]:
        """The pieces of these parameters that this rank steps."""
        found = (self._fragments[name] for name in names)
        return [fragment for fragment in found if fragment is not None]

    def weights(self) -> dict[str, Tensor]:
        """Copy the float32 weights, whole on every rank."""
        return self._gather(lambda fragment: fragment.owner)

    def momenta(self) -> dict[str, Tensor]:
        """Copy the optimizer's momentum of every parameter; zeros before the first step."""
        return self._gather(lambda fragment: self._optimizer.state.get(fragment.owner, {}).get("momentum_buffer"))

    def keep_frozen(self) -> None:
        """Have the optimizer leave alone what is frozen at a step, as torch's own does with what has no gradient.

        A partition has a gradient for all that it holds: momentum and weight decay would go on moving it.
        """
        kept: list[tuple[Tensor, Tensor]] = []

        @torch.no_grad()
        def look(*_: object) -> None:
            frozen = (
                each for each in self._fragments.values() if each is not None and not each.parameter.requires_grad
            )
            pieces = [fragment.of(held.detach()) for fragment in frozen for held in self._held(fragment)]
            kept[:] = [(piece, piece.clone()) for piece in pieces]

        @torch.no_grad()
        def put_back(*_: object) -> None:
            for piece, values in kept:
                piece.copy_(values)

        self._optimizer.register_step_pre_hook(look)
        self._optimizer.register_step_post_hook(put_back)

    def _held(self, fragment: Fragment) -> list[Tensor]:
        """What the optimizer has of a piece: the owner of its values and, after a step, that of its momentum."""
        momentum = self._optimizer.state.get(fragment.owner, {}).get("momentum_buffer")
        return [fragment.owner, *([] if momentum is None else [momentum])]

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], momenta: Mapping[str, Tensor]) -> None:
        """Write back what `weights` and `momenta` gave, on any engine and number of ranks."""
        for name, fragment in self._fragments.items():
            if fragment is None:
                continue
            state = self._optimizer.state[fragment.owner]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(fragment.owner)
            for target, source in ((fragment.owner, weights[name]), (state["momentum_buffer"], momenta[name])):
                piece = fragment.of(target.detach())
                piece.copy_(source.flatten()[fragment.offset :][: fragment.count].view(piece.shape))

    @torch.no_grad()
    def _gather(self, holder: Callable[[Fragment], Tensor | None]) -> dict[str, Tensor]:
        found = {}
        for name, fragment in self._fragments.items():
            held = None if fragment is None else holder(fragment)
            flat = torch.zeros(self.shapes[name].numel(), device=self._device)
            if fragment is not None and held is not None:
                flat[fragment.offset :][: fragment.count] = fragment.of(held.detach()).flatten()
            found[name] = flat
        if self._sum_over_ranks is not None and found:  # one message for all: the pieces of other ranks are zeros here
            total = self._sum_over_ranks(torch.cat(list(found.values())))
            pieces = torch.split(total, [flat.numel() for flat in found.values()])
            found = dict(zip(found, pieces, strict=True))
        return {name: flat.view(self.shapes[name]) for name, flat in found.items()}
