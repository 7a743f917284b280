"""Ridge least squares from second moments, which take the same memory whatever the number of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried in turn, as shares of the features' mean variance."""


@dataclass(frozen=True)
class Moments:
    """Sums over samples of features x, targets y and their products, in float64, for systems side by side."""

    xx: Tensor  # (systems, features, features)
    yx: Tensor  # (systems, targets, features)
    yy: Tensor  # (systems, targets)
    x: Tensor  # (systems, features)
    y: Tensor  # (systems, targets)
    n: Tensor  # (1,)

    @classmethod
    def none(cls, systems: int, features: int, targets: int, device: torch.device) -> Self:
        """Nothing seen so far."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            xx=zeros(systems, features, features),
            yx=zeros(systems, targets, features),
            yy=zeros(systems, targets),
            x=zeros(systems, features),
            y=zeros(systems, targets),
            n=zeros(1),
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in features (systems, samples, features) and targets (systems, samples, targets)."""
        x, y = x.double(), y.double()
        self.xx.add_(x.mT @ x)
        self.yx.add_(y.mT @ x)
        self.yy.add_((y * y).sum(1))
        self.x.add_(x.sum(1))
        self.y.add_(y.sum(1))
        self.n.add_(x.shape[1])

    def over(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> Self:
        """Add up what all ranks have seen, in one message."""
        parts = (self.xx, self.yx, self.yy, self.x, self.y, self.n)
        flat = sum_over_ranks(torch.cat([part.flatten() for part in parts]))
        new = torch.split(flat, [part.numel() for part in parts])
        return type(self)(*(values.view_as(part) for values, part in zip(new, parts, strict=True)))

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.yy).all() and torch.isfinite(self.xx).all())


@dataclass(frozen=True)
class Line:
    """y = weight x + constant."""

    weight: Tensor  # (systems, targets, features)
    constant: Tensor  # (systems, targets)
    ridge: float
    """By which it was found."""

    def error(self, on: Moments) -> float:
        """Mean square error over samples, summed over targets."""
        w, c = self.weight, self.constant
        square = on.yy - 2 * (w * on.yx).sum(2) + ((w @ on.xx) * w).sum(2)
        mean = on.y - (w @ on.x[..., None]).squeeze(2)
        return float((square - 2 * c * mean + on.n * c**2).sum() / on.n)


def ridged(matrix: Tensor, ridge: Tensor) -> Tensor:
    """Copy square matrices, (systems, n, n), with their ridge, (systems, 1), added on the diagonal."""
    copied = matrix + 0.0  # a product with an identity would take two more of what may be large
    copied.diagonal(dim1=1, dim2=2).add_(ridge)
    return copied


def solve(fit: Moments, held: Moments, *, has_constant: bool) -> Line | None:
    """Fit targets by features with the ridge that errs least on the samples held out; None where 0 errs less.

    Singular systems are no matter: the ridge holds them, and one too small to do so is passed over.
    """
    xx, yx = fit.xx, fit.yx
    if has_constant:  # by centring
        xx = xx - fit.x[:, :, None] * fit.x[:, None, :] / fit.n
        yx = yx - fit.y[:, :, None] * fit.x[:, None, :] / fit.n
    scale = xx.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    best: Line | None = None
    least = Line(torch.zeros_like(yx), torch.zeros_like(fit.y), 0.0).error(held)
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(ridged(xx, ridge * scale))
        if failed.any():
            continue
        weight = torch.cholesky_solve(yx.mT, factor).mT
        constant = (fit.y - (weight @ fit.x[..., None]).squeeze(2)) / fit.n
        line = Line(weight, constant if has_constant else torch.zeros_like(constant), ridge)
        error = line.error(held)
        if error < least:
            best, least = line, error
    return best
