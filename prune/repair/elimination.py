"""Backward elimination: a channel is worth what the layers that read it lose for good, once they are solved anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.prune.map import CONSTANT, ChannelMap, Coupling, Ints, few
from netslim.prune.record import Questions, recorded
from netslim.prune.repair.calibration import Calibration, See, watch
from netslim.prune.repair.foresight import UNSOLVED, WIDEST, is_wide
from netslim.prune.repair.reconstruction import check_finite, not_finite, samples_of
from netslim.prune.repair.ridge import Moments

RIDGE = 1e-4
"""Added to second moments, as a share of their mean, so that channels which say the same can be told apart."""
_STAYS = -1


@torch.no_grad()
def elimination_scores(
    model: nn.Module, channels: ChannelMap, coupling: Coupling, calibration: Calibration
) -> dict[str, Tensor]:
    """Score every gamma of every BatchNorm, (width,) float64, by what reconstruction could not restore without it.

    Channels are eliminated one after the other, always the one whose loss can be made up for best by those that are
    left, until none is. Its score is the share of its readers' output variance that was lost with it, or with one
    before it if that was more; several readers add up. Outputs count as the BatchNorm after them scales them. Each
    layer by itself, on the inputs that the whole network gives it, so what earlier layers lose is left out. A channel
    that no convolution or linear layer reads scores as the last one to go does.

    On several ranks all get the same scores. Memory is that of the second moments of all layers' inputs, whatever the
    number of images. Of a layer with more than 10,240 weights for each output none are taken: to it a channel is worth
    all that it gives, as if others could not make up for it. What else reads a channel than torch's Conv2d and Linear,
    called once, does not count. Lines say so. The model is left in the mode it is in.

    Raises: ValueError if activations are not finite.
    """
    unit_of = _units(channels, coupling)
    readers = _read(model, channels, unit_of, calibration)
    components = calibration.show(_components(readers), "scoring channels")
    lost = {unit: share for component in components for unit, share in _eliminate(component)}
    most = max(lost.values(), default=0.0)
    return {
        layer.name: torch.tensor(
            [lost.get(unit, most) for unit in unit_of[channels.ends[layer.name][1]].tolist()], dtype=torch.float64
        )
        for layer in channels.layers
    }


@dataclass
class _Wide:
    """A layer whose second moments would take too much memory: what a unit gives to it counts in full."""

    features: dict[int, float]
    """The share of the outputs' variance that each unit takes with it which can still go."""

    def costs(self) -> dict[int, float]:
        return dict(self.features)

    def remove(self, unit: int) -> None:
        del self.features[unit]


@dataclass
class _Reader:
    """A layer, or one group of a convolution, solved by least squares on the channels that are still there.

    Without features S the outputs' square error grows by tr(W_S (H_SS)^-1 W_S'), where H is the inverse of the second
    moments, and the best weights and H of what is left follow in closed form (Hassibi and Stork 1993, eq. 5).
    """

    weight: Tensor  # (outputs, features)
    inverse: Tensor  # (features, features), H
    total: float
    """The variance of all of the layer's outputs."""
    features: dict[int, Tensor]
    """Of each unit that can still go."""

    def costs(self) -> dict[int, float]:
        """What share of the outputs' variance each unit would take with it."""
        by_size: defaultdict[int, list[int]] = defaultdict(list)
        for unit, indices in self.features.items():
            by_size[len(indices)].append(unit)
        found: dict[int, float] = {}
        for units in by_size.values():
            indices = torch.stack([self.features[unit] for unit in units])
            blocks = self.inverse[indices[:, :, None], indices[:, None, :]]
            weights = self.weight[:, indices].movedim(1, 0).mT
            lost = (torch.linalg.solve(blocks, weights) * weights).sum((1, 2))
            found |= dict(zip(units, (lost / self.total).tolist(), strict=True))
        return found

    def remove(self, unit: int) -> None:
        """Let a unit go; the others make up for it as well as they can."""
        gone = self.features.pop(unit)
        rows = torch.linalg.solve(self.inverse[gone[:, None], gone], self.inverse[gone])
        self.weight -= self.weight[:, gone] @ rows
        self.inverse -= self.inverse[:, gone] @ rows


def _units(channels: ChannelMap, coupling: Coupling) -> Ints:
    """What goes together with each channel of the map, by number; _STAYS where nothing can go."""
    unit_of = np.full(len(channels.fixed), _STAYS)
    for layer in channels.layers:
        inputs, outputs = channels.ends[layer.name]
        can_go = np.asarray(layer.removable(coupling))
        if coupling == "group":
            unit_of[inputs[can_go]] = unit_of[outputs[can_go]] = np.asarray(layer.classes)[can_go]
        else:
            unit_of[outputs[can_go]] = outputs[can_go]
    unit_of[CONSTANT] = _STAYS
    return unit_of


def _read(model: nn.Module, channels: ChannelMap, unit_of: Ints, calibration: Calibration) -> list[_Reader | _Wide]:
    """Find the layers that read what can go, and the second moments of their inputs."""
    asked = Questions(model, recorded(model, calibration.example))
    once, norms = asked.called_once, asked.norms_after
    layers = {
        end.name: (layer, unit_of[list(end.inputs)])
        for end in channels.modules
        if isinstance(layer := once.get(end.name), nn.Conv2d | nn.Linear)
        and (unit_of[list(end.inputs)] != _STAYS).any()
    }
    norms_of_map = {layer.name for layer in channels.layers}
    odd = [
        repr(end.name)
        for end in channels.modules
        if end.name not in (layers.keys() | norms_of_map) and (unit_of[list(end.inputs)] != _STAYS).any()
    ]
    if odd:
        calibration.say(f"the score reconstruction leaves out what channels are worth to {few(odd)}: {UNSOLVED}")
    wide = [name for name, (layer, _) in layers.items() if is_wide(layer.weight[0].numel(), _groups(layer))]
    if wide:
        calibration.say(
            f"the score reconstruction does not solve {few([repr(name) for name in wide])}: more than {WIDEST} weights "
            "for each output would take too much memory, so what a channel gives to them counts in full"
        )
    readers: list[_Reader | _Wide] = []
    for name in wide:
        broad, units = layers.pop(name)
        readers += _wide(model, name, broad, units, _gains(broad, norms.get(name)), calibration)
    moments = _input_moments(model, [layer for layer, _ in layers.values()], calibration)
    for (name, (layer, units)), seen in zip(layers.items(), moments, strict=True):
        check_finite(seen, name)
        second = (seen.xx - seen.x[:, :, None] * seen.x[:, None, :] / seen.n) / seen.n
        weight = layer.weight.flatten(1).double()
        gains = _gains(layer, norms.get(name))
        if gains is not None:
            weight = weight * gains[:, None]
        weights = weight.view(len(second), -1, second.shape[-1])
        total = float(((weights @ second) * weights).sum().clamp(min=torch.finfo(torch.float64).tiny))
        eye = torch.eye(second.shape[-1]).to(second)
        ridge = RIDGE * second.diagonal(dim1=1, dim2=2).mean().clamp(min=torch.finfo(torch.float32).tiny)
        inverses = torch.linalg.inv(second + ridge * eye)
        for group, own in enumerate(np.split(units, len(second))):
            features = _features(own, second.shape[-1] // len(own), second.device)
            if features:
                readers.append(_Reader(weights[group].clone(), inverses[group], total, features))
    return readers


def _groups(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _gains(layer: nn.Module, norm: _BatchNorm | None) -> Tensor | None:
    """By what the BatchNorm after a layer multiplies its outputs, (outputs,) float64; None where there is none."""
    if norm is None or not norm.affine:
        return None
    assert norm.running_var is not None, "asked before"
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _wide(
    model: nn.Module,
    name: str,
    layer: nn.Conv2d | nn.Linear,
    units: Ints,
    gains: Tensor | None,
    calibration: Calibration,
) -> list[_Wide]:
    """Measure what share of a wide layer's output variance comes of each unit alone; a reader for each group."""
    groups = _groups(layer)
    weight = layer.weight.flatten(1).view(groups, len(layer.weight) // groups, -1).double()
    own = [_features(part, weight.shape[-1] // len(part), weight.device) for part in np.split(units, groups)]
    whole = torch.arange(weight.shape[-1], device=weight.device)
    # of what all units, and then each of them, give to the outputs: sums and sums of squares
    parts = [(group, some) for group, each in enumerate(own) for some in (whole, *each.values())]
    sums = torch.zeros(len(parts), 2, weight.shape[1], dtype=torch.float64, device=weight.device)
    count = sums.new_zeros(1)

    def add(inputs: Tensor, output: Tensor, number: int) -> None:
        x = samples_of(layer, inputs, (output,), seed=number)[0]
        for place, (group, some) in enumerate(parts):
            given = x[group][:, some].double() @ weight[group][:, some].mT
            sums[place] += torch.stack([given.sum(0), given.square().sum(0)])
        count.add_(x.shape[1])

    watch(model, calibration, [(layer, add)])
    flat = calibration.sum_over_ranks(torch.cat([sums.flatten(), count]))
    if not torch.isfinite(flat).all():
        raise not_finite(name)
    first, second = (flat[:-1].view_as(sums) / flat[-1]).unbind(1)
    variances = second - first.square()
    if gains is not None:
        variances = variances * torch.stack([gains.view(groups, -1)[group] for group, _ in parts]).square()
    shares = iter(variances.sum(1).clamp(min=0).tolist())
    found, total = [], torch.finfo(torch.float64).tiny
    for each in own:
        total += next(shares)
        found.append({unit: next(shares) for unit in each})
    return [_Wide({unit: share / total for unit, share in each.items()}) for each in found if each]


def _features(units: Ints, per_channel: int, device: torch.device) -> dict[int, Tensor]:
    """Which features of a layer's input belong to each unit."""
    places = np.arange(len(units) * per_channel).reshape(len(units), per_channel)
    return {
        int(unit): torch.from_numpy(places[units == unit].flatten()).to(device)
        for unit in np.unique(units)
        if unit != _STAYS
    }


def _input_moments(
    model: nn.Module, layers: Sequence[nn.Conv2d | nn.Linear], calibration: Calibration
) -> list[Moments]:
    """Take the second moments of what goes into each layer, over all images and ranks."""
    found, shown = [], list[tuple[nn.Module, See]]()
    for order, layer in enumerate(layers):
        moments = Moments.none(_groups(layer), layer.weight[0].numel(), 0, layer.weight.device)
        found.append(moments)

        def add(
            inputs: Tensor,
            output: Tensor,
            number: int,
            layer: nn.Conv2d | nn.Linear = layer,
            moments: Moments = moments,
            order: int = order,
        ) -> None:
            (x, y) = samples_of(layer, inputs, (output,), seed=(order << 32) + number)
            moments.add(x, y[:, :, :0])

        shown.append((layer, add))
    watch(model, calibration, shown)
    return [moments.over(calibration.sum_over_ranks) for moments in found]


def _components(readers: Sequence[_Reader | _Wide]) -> list[list[_Reader | _Wide]]:
    """Group the readers that read a unit in common, directly or through others."""
    home: dict[int, list[_Reader | _Wide]] = {}
    for reader in readers:
        joined = [reader]
        for other in {id(home[unit]): home[unit] for unit in reader.features if unit in home}.values():
            joined += other
        for member in joined:
            home |= dict.fromkeys(member.features, joined)
    return list({id(component): component for component in home.values()}.values())


def _eliminate(readers: Sequence[_Reader | _Wide]) -> Iterable[tuple[int, float]]:
    """Give every unit in the order in which they go, with the largest loss so far."""
    reading: defaultdict[int, list[_Reader | _Wide]] = defaultdict(list)
    costs = {}
    for reader in readers:
        costs[id(reader)] = reader.costs()
        for unit in reader.features:
            reading[unit].append(reader)
    sums = {unit: sum(costs[id(reader)][unit] for reader in each) for unit, each in reading.items()}
    most = 0.0
    while sums:
        unit = min(sums, key=sums.__getitem__)
        most = max(most, sums.pop(unit))
        yield unit, most
        for reader in reading[unit]:
            reader.remove(unit)
            before, costs[id(reader)] = costs[id(reader)], reader.costs()
            for other, cost in costs[id(reader)].items():
                sums[other] += cost - before[other]
