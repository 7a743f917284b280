"""Which network is trained, and what its weights start from."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from netslim.base import plainly
from netslim.train.models.weights import SUFFIXES, digest_of


@plainly
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ModelConfig:
    name: str = "vgg19"
    """vgg11|13|16|19, preresnet20|56|110|164, densenet40, any torchvision classifier, timm:NAME for timm's, or your
    own: module:function."""
    width: Annotated[float, Field(gt=0, le=16)] = 1.0
    """Factor on the number of channels of every layer (not for networks of torchvision or timm, or your own)."""
    weights: Path | None = None
    """File that the weights start from: .safetensors, or the tensors of a .pth, .pt or .bin; None is newly initialised
    as a function of the seed."""
    weights_head: Literal["keep", "new"] = "keep"
    """A classifier for another number of classes than the images have is refused by keep; by new it starts newly
    initialised."""
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """What the file has to be; None is as it is found when a run begins, which the run's config.json keeps."""
    initial_gamma: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Scale that every BatchNorm starts from; None leaves the network's own, or the file's. auto is None with weights,
    and without 0.5, as Liu et al. 2017 use."""

    def __post_init__(self) -> None:
        if self.weights is None and (self.weights_head != "keep" or self.weights_sha256 is not None):
            raise ValueError("model.weights_head and model.weights_sha256 are of model.weights, which is None; name it")
        if self.weights is not None and self.weights.suffix not in SUFFIXES:
            raise ValueError(f"model.weights {self.weights} is none of {', '.join(SUFFIXES)}; save it as one")

    @property
    def first_gamma(self) -> float | None:
        """The scale that every BatchNorm starts from; None: the network's own, or the file's."""
        if self.initial_gamma != "auto":
            return self.initial_gamma
        return 0.5 if self.weights is None else None

    @property
    def anew(self) -> "ModelConfig":
        """The same network without a file: for what is loaded over it, or starts from scratch."""
        return dataclasses.replace(self, weights=None, weights_head="keep", weights_sha256=None)

    @property
    def pinned(self) -> "ModelConfig":
        """The same, that takes its file's present content alone; raises FileNotFoundError where there is none."""
        if self.weights is None or self.weights_sha256 is not None:
            return self
        return dataclasses.replace(self, weights_sha256=digest_of(self.weights))
