"""Least squares before a ReLU: what it makes zero in any case need not be met exactly, only stay on that side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from netslim.prune.repair.ridge import Line, Moments, ridged

STEPS = 10
"""Of the accelerated descent: more of them gain nothing."""


@dataclass(frozen=True)
class Hinge:
    """Where the ReLU after a layer gives zero: for each output on one side of a value."""

    at: Tensor  # (systems, 1, targets)
    side: Tensor  # (systems, 1, targets): 1 = below the value, -1 = above it, 0 = nowhere

    @classmethod
    def of(cls, norm: _BatchNorm | None, systems: int, targets: int, device: torch.device) -> Hinge:
        """Find it in the layer's own outputs, whether or not a BatchNorm in eval mode stands before the ReLU."""
        at, side = torch.zeros(2, systems * targets, dtype=torch.float64, device=device)
        side += 1
        if norm is not None:
            assert norm.running_mean is not None, "asked before"
            assert norm.running_var is not None, "comes with the mean"
            gamma = norm.weight.double() if norm.affine else torch.ones_like(at)
            beta = norm.bias.double() if norm.affine else torch.zeros_like(at)
            side = gamma.sign()
            deviation = (norm.running_var.double() + norm.eps).sqrt()
            at = norm.running_mean.double() - torch.where(side == 0, 0.0, beta * deviation / gamma)
        return cls(at.view(systems, 1, targets), side.view(systems, 1, targets))

    def lack(self, target: Tensor, output: Tensor) -> Tensor:
        """What the outputs lack of the targets; on the side of zero of a target that is there, nothing."""
        beyond = (self.side * (output - self.at)).clamp(min=0)
        return torch.where(self.side * (target - self.at) < 0, -self.side * beyond, target - output)

    def difference(self, target: Tensor, output: Tensor) -> Tensor:
        """By how much they differ after the ReLU, up to a factor for each output."""
        here = self.side != 0
        before, after = (torch.where(here, (self.side * (y - self.at)).clamp(min=0), y) for y in (target, output))
        return after - before


@dataclass(frozen=True)
class Rows:
    """Some samples, kept in memory: features, and a layer's outputs before and as they should be."""

    x: Tensor  # (systems, samples, features)
    output: Tensor  # (systems, samples, targets)
    target: Tensor  # (systems, samples, targets)


def refine(
    line: Line,
    fit: Sequence[Rows],
    held: Sequence[Rows],
    hinge: Hinge,
    sum_over_ranks: Callable[[Tensor], Tensor],
    *,
    has_constant: bool,
) -> Line:
    """Improve on a fit by least squares, given the ReLU after it: on the held-out rows it errs no more after that.

    Minimises the squared lack, which is convex and bounds the difference after the ReLU (compare Zhang et al. 2015,
    arXiv 1411.4229, section 3.2), by Nesterov's accelerated descent, whose every step is a least-squares solution with
    the same second moments.
    """
    weight, constant = line.weight, line.constant
    systems, _, features = weight.shape
    moments = Moments.none(systems, features, 0, weight.device)  # of the features alone
    for rows in fit:
        moments.add(rows.x, rows.target[:, :, :0])
    moments = moments.over(sum_over_ranks)
    mean = moments.x / moments.n if has_constant else torch.zeros_like(moments.x)
    second = moments.xx / moments.n - mean[:, :, None] * mean[:, None, :]
    ridge = line.ridge * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    factor, failed = torch.linalg.cholesky_ex(ridged(second, ridge[..., 0]))
    if failed.any():
        return line
    constant = constant + (weight @ mean[..., None]).squeeze(2)  # of centred features
    ahead, momentum = (weight, constant), 1.0
    for _ in range(STEPS):
        products, sums = _products(fit, hinge, Line(*ahead, line.ridge), mean, sum_over_ranks)
        change = torch.cholesky_solve((products / moments.n - ridge * ahead[0]).mT, factor).mT
        new = (ahead[0] + change, ahead[1] + has_constant * sums / moments.n)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        push = (momentum - 1) / following
        ahead = (new[0] + push * (new[0] - weight), new[1] + push * (new[1] - constant))
        (weight, constant), momentum = new, following
    refined = replace(line, weight=weight, constant=constant - (weight @ mean[..., None]).squeeze(2))
    before, after = (_error(held, hinge, each, sum_over_ranks) for each in (line, refined))
    return refined if after < before else line


def _output(rows: Rows, line: Line, x: Tensor) -> Tensor:
    return rows.output.double() + x @ line.weight.mT + line.constant[:, None, :]


def _products(
    fit: Sequence[Rows], hinge: Hinge, line: Line, mean: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Sum lack times features, (systems, targets, features), and lack, (systems, targets), over samples and ranks."""
    products, sums = torch.zeros_like(line.weight), torch.zeros_like(line.constant)
    for rows in fit:
        x = rows.x.double() - mean[:, None, :]
        lack = hinge.lack(rows.target.double(), _output(rows, line, x))
        products += lack.mT @ x
        sums += lack.sum(1)
    flat = sum_over_ranks(torch.cat([products.flatten(), sums.flatten()]))
    return flat[: products.numel()].view_as(products), flat[products.numel() :].view_as(sums)


def _error(held: Sequence[Rows], hinge: Hinge, line: Line, sum_over_ranks: Callable[[Tensor], Tensor]) -> float:
    error = torch.zeros(1, dtype=torch.float64, device=line.weight.device)
    for rows in held:
        error += hinge.difference(rows.target.double(), _output(rows, line, rows.x.double())).square().sum()
    return float(sum_over_ranks(error))
