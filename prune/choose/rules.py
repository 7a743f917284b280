"""The rules of a choice: what is counted, how a channel is scored, and what every layer keeps."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from netslim.base import plainly
from netslim.prune.map import Coupling

Target = Literal["channels", "params", "macs"]
Score = Literal["gamma", "gamma_norm", "reconstruction"]
Reduce = Literal["max", "mean", "sum"]
Normalise = Literal["none", "mean"]
Scope = Literal["network", "family", "layer"]

_Share = Annotated[float, Field(ge=0, le=1)]


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Rules:
    """How channels are chosen, besides the ratio. All rules hold exactly, or the ratio is refused."""

    coupling: Coupling = "group"
    """group: channels that the network couples go together; select: each scale by itself, with index selections."""
    target: Target = "channels"
    """What the ratio is a share of: removable BatchNorm channels, parameters, or multiply-accumulates per image."""
    score: Score = "gamma"
    """gamma: |gamma|; gamma_norm: |gamma| times the norm of the weights that read the channel; reconstruction: what
    the layers that read it lose for good, once they are solved anew without it (by the images of the repair)."""
    reduce: Reduce = "max"
    """Score of channels that go together, from their own: under group."""
    normalise: Normalise = "none"
    """mean: every score is divided by the mean of its BatchNorm's, so that layers of different scales compare."""
    scope: Scope = "network"
    """What one threshold holds for. network: all channels (Liu et al. 2017). layer: those that the same layers share.
    family: those that layers of the same kinds share, likewise connected (Fang et al. 2024, arXiv 2407.04616). Scores
    then count by their rank there, so that each loses the same share."""
    min_channels: Annotated[int, Field(ge=1)] = 1
    """Channels that every layer keeps."""
    min_share: _Share = 0.0
    """Share of its channels that every layer keeps."""
    max_ratio: _Share = 1.0
    """Largest share of its channels that a layer may lose."""
    round_to: Annotated[int, Field(ge=1)] = 1
    """Kept channels of every cut layer are rounded up to a multiple of this, or to all; the largest come back."""
    exclude: tuple[str, ...] = ()
    """Layers that lose no channel: names or patterns of them (`layer4.*`), or types (`Linear`)."""

    @property
    def unread(self) -> dict[str, str]:
        """The fields that nothing reads beside the others, and why."""
        return {"reduce": "coupling is select"} if self.coupling == "select" else {}

    def __str__(self) -> str:
        """Name the rules that differ from the defaults."""
        usual = Rules()
        changed = {key: value for key, value in vars(self).items() if value != getattr(usual, key, value)}
        return ", ".join(f"{key} {_words(value)}" for key, value in changed.items())


def check_ratio(ratio: float) -> None:
    """Raise ValueError for what is no share of the channels that can go."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio} is not in [0, 1): it is the share of all that can go; try 0.5")


def exact(share: float) -> Fraction:
    """Read a share as the decimal that was written: the binary 0.29 is a little less than 29/100."""
    return Fraction(repr(float(share)))


def _words(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
