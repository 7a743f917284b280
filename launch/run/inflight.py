"""Slimming in flight: channels that sparsity training has brought to zero are cut while it goes on."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn

from netslim.base import complaint
from netslim.prune import ChannelMap, Plan, Rules, absorb, choose_zeros, cost, cut, embed, open_gammas, scales_of
from netslim.train import Runtime, SparsityConfig

_GONE, _IDLE, _ALIVE = 0.0, 1.0, 3.0
"""Scores: what is gone goes first, so that no rule can bring it back; then the idle, up to 2; what is alive stays."""


class _Size(NamedTuple):
    """What an image costs from a step on."""

    since: Annotated[int, Field(ge=0)]
    macs: Annotated[int, Field(gt=0)]


@validated(frozen=True, config=ConfigDict(strict=True))
class _State:
    """What a checkpoint holds."""

    plan: str
    sizes: Annotated[tuple[_Size, ...], Field(min_length=1)]


class InFlight:
    """The network of a sparsity training that gets smaller, and the plan by which it was made of the whole one.

    Rank 0 makes each plan, of the whole network: what is gone counts as a channel with gamma 0, so that floors and, in
    the end, the ratio mean the same as without.
    """

    def __init__(
        self,
        dense: nn.Module,
        model: nn.Module,
        plan: Plan | None,
        channels: ChannelMap,
        rules: Rules,
        config: SparsityConfig,
        run: Runtime,
        example: Tensor,
        most: float = 1.0,
    ) -> None:
        """``dense`` is the whole network, ``model`` what is trained of it, by a ``plan`` or all of it.

        ``example`` (2, 3, height, width): images by which constants are told from values. ``most``: the share of the
        channels that may be gone, in [0, 1]; of more at zero the others stay, since they may yet come back.
        """
        self.dense, self.model, self.plan, self.first = copy.deepcopy(dense), model, plan, plan
        self.channels, self.config, self.run, self.example, self.most = channels, config, run, example, most
        self.rules = replace(rules, target="channels", score="gamma", reduce="max")
        self._sizes = [_Size(0, cost(model, example[:1]).macs)]

    @property
    def state(self) -> str | None:
        if self.plan is None or self.plan is self.first:
            return None
        return json.dumps({"plan": self.plan.to_json(), "sizes": self._sizes})

    @property
    def num_gone(self) -> int:
        """Channels that were removed in flight."""
        return (self.plan.num_removed if self.plan else 0) - (self.first.num_removed if self.first else 0)

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        return step % max(1, round(self.config.interval(self.run.engine) * steps_per_epoch)) == 0

    def shrink(
        self, model: nn.Module, momenta: Mapping[str, Tensor], step: int
    ) -> tuple[nn.Module, dict[str, Tensor]] | None:
        whole, whole_momenta = self.whole(model), self.whole(_with_momenta(model, momenta))
        plan = Plan.from_json(self.run.on_main(lambda: self._choose(whole, whole_momenta).to_json()))
        if plan.num_removed == (self.plan.num_removed if self.plan else 0):
            return None
        small, moving = cut(whole, plan), cut(whole_momenta, plan)
        if self.config.reconfigure_below:
            absorb(whole, small, plan, self.example)
        self.run.check_equal(small, "after a cut in flight")
        self.plan, self.model = plan, small
        self._sizes.append(_Size(step, cost(small, self.example[:1]).macs))
        return small, {name: parameter.detach() for name, parameter in moving.named_parameters()}

    def restore(self, state: str) -> nn.Module:
        try:
            found = TypeAdapter(_State).validate_json(state)
        except ValidationError as error:
            raise ValueError(f"the channels that are gone: {complaint(error)}") from None
        self.plan = Plan.from_json(found.plan)
        self.model, self._sizes = cut(self.dense, self.plan), list(found.sizes)
        return self.model

    def gammas(self) -> list[nn.Parameter]:
        return open_gammas(self.dense, self.channels, self.rules, self.model)

    def metrics(self, step: int) -> dict[str, float]:
        """``macs_spent``: what the steps so far have cost, as a share of what all would have like the first."""
        ends = [*(size.since for size in self._sizes[1:]), step]
        spent = sum(size.macs * (end - size.since) for size, end in zip(self._sizes, ends, strict=True))
        return {
            "channels_gone": self.num_gone,
            "macs": self._sizes[-1].macs,
            "macs_spent": spent / step / self._sizes[0].macs,
        }

    def whole(self, model: nn.Module) -> nn.Module:
        """The whole network, in which the channels that are gone have gamma and beta 0."""
        return model if self.plan is None else embed(self.dense, model, self.plan)

    def result(self) -> nn.Module:
        """The network in the shapes that it had before the first cut in flight."""
        whole = self.whole(self.model)
        return whole if self.first is None else cut(whole, self.first)

    def _choose(self, whole: nn.Module, momenta: nn.Module) -> Plan:
        """The plan for the whole network, whose ``momenta`` are in a network of the same shape."""
        kept = {} if self.plan is None else {layer.name: layer.kept for layer in self.plan.layers}
        layers = {layer.name: layer for layer in self.channels.layers}
        pulls, scores = self.channels.named_gammas(momenta, self.rules.coupling), {}
        for name, gamma in self.channels.named_gammas(whole, self.rules.coupling).items():
            magnitude, pull = (values.detach().abs().double().cpu() for values in (gamma, pulls[name]))
            idle = magnitude <= self.config.reconfigure_below
            _, beta = scales_of(whole, layers[name])
            if beta is not None and not self.config.reconfigure_below:  # else what is left of it is absorbed
                idle &= beta.detach().cpu() == 0
            # where not all can go, those first that are smallest, or that the loss pulls least
            near = magnitude if self.config.reconfigure_below else pull
            score = torch.where(idle, _IDLE + near / (1 + near), _ALIVE + magnitude)
            gone = torch.ones(len(score), dtype=torch.bool)
            gone[list(kept.get(name, range(len(score))))] = False
            scores[name] = score.masked_fill(gone, _GONE)
        return choose_zeros(scores, self.channels, self.rules, _IDLE + 1, self.most)


def _with_momenta(model: nn.Module, momenta: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model that holds momenta in the places of the parameters."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(momenta[name]) if name in momenta else parameter.zero_()
    return twin
