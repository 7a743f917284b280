"""What a repair cannot solve, known from shapes and counts: before any training, and before any matrix is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from netslim.prune.map import few
from netslim.prune.record import PRODUCING, Questions, layers_of, on_a_copy, recorded
from netslim.prune.repair.calibration import FEWEST, num_fitted

UNSOLVED = "they are no Conv2d or Linear of torch's that a forward pass calls once"
"""Why layers have no system."""
POSITIONS = 32
"""Places of a convolution's output, per image, that its system takes in; all where there are fewer."""
WIDEST = 10240
"""Weights for each output beyond which a layer is not solved: one matrix of such a system takes 0.8 GB, and six of them
are held at once. Of a convolution in g groups: beyond 10,240 / sqrt(g) for each group."""


@dataclass(frozen=True)
class System:
    """The system of least squares by which a layer is solved, or those of the groups of a convolution."""

    features: int
    """Weights for each output."""
    groups: int
    per_image: float
    """Samples that an image gives."""

    @property
    def is_wide(self) -> bool:
        """Whether its matrices are not built, because of the memory that they would take."""
        return is_wide(self.features, self.groups)

    def is_determined(self, num_images: int) -> bool:
        """Whether so many images, to which it is fitted, give as many samples as it has weights."""
        return self.per_image * num_images >= self.features


def is_wide(features: int, groups: int) -> bool:
    """Tell whether the second moments of a layer's inputs, a matrix for each group, would take too much memory."""
    return groups * features**2 > WIDEST**2


def systems_of(network: nn.Module, example: Tensor) -> dict[str, System]:
    """Find the systems of the layers that a reconstruction solves, by name, in the order of execution.

    Of convolutions and linear layers that a forward pass calls once. The network is run on the example, images
    (n, 3, height, width), on a copy without numbers if that suffices; no matrix is built.
    """
    once = Questions(network, recorded(network, example)).called_once
    names = [name for name, layer in once.items() if isinstance(layer, nn.Conv2d | nn.Linear)]
    samples: dict[str, float] = {}

    def look(twin: nn.Module, images: Tensor) -> None:
        for name in names:

            def count(layer: nn.Module, _: object, output: Tensor, name: str = name) -> None:
                places = output.numel() / output.shape[1 if isinstance(layer, nn.Conv2d) else -1] / len(images)
                samples[name] = min(places, POSITIONS) if isinstance(layer, nn.Conv2d) else places

            twin.get_submodule(name).register_forward_hook(count)
        twin(images)

    on_a_copy(network, example, look)  # type: ignore[arg-type]  # an example that is images stays such
    found = {}
    for name in names:
        layer = once[name]
        assert isinstance(layer, nn.Conv2d | nn.Linear), "asked before"
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        found[name] = System(layer.weight[0].numel(), groups, samples[name])
    return found


def too_few(num_images: int) -> str | None:
    """Say why so many images are too few to measure a repair by; None if they are not."""
    if num_images >= FEWEST:
        return None
    return f"a repair needs at least {FEWEST} images to measure by, {num_images} are given"


def foreseen(network: nn.Module, example: Tensor, num_images: int) -> list[str]:
    """Say what a repair of a cut of this network has to leave as it is, one line for each reason; mostly none.

    Args: example, an image or more (n, 3, height, width), of which the shape alone counts; num_images to repair by.
    """
    few_images = too_few(num_images)
    if few_images:
        return [f"cut networks will not be repaired: {few_images}"]
    systems = systems_of(network, example)
    lines = said(systems, left_of(systems, num_fitted(num_images)), num_images)
    return [*(f"{line} (of the whole network; a cut has fewer)" for line in lines), *unsolved(network, systems)]


def unsolved(network: nn.Module, systems: Mapping[str, System]) -> list[str]:
    """Say which layers are none that `reconstruct` solves, in a line; none where it solves all."""
    every = [name for name, layer in layers_of(network).items() if isinstance(layer, PRODUCING)]
    odd = [repr(name) for name in every if name not in systems]
    if not odd:
        return []
    return [f"reconstruct leaves {len(odd)} of {len(every)} layers as they are: {few(odd)}, since {UNSOLVED}"]


def left_of(systems: Mapping[str, System], num_fitted: int) -> list[str]:
    """Name the layers that so many images, to which the others are fitted, do not determine, or that are too wide."""
    return [name for name, each in systems.items() if each.is_wide or not each.is_determined(num_fitted)]


def said(systems: Mapping[str, System], left: list[str], num_images: int) -> list[str]:
    """Say which layers `reconstruct` leaves as they are, and what would help: a line for each reason."""
    lines = []
    wide = [name for name in left if systems[name].is_wide]
    if wide:
        lines.append(f"{_left(wide, systems)}, and more than {WIDEST} would take too much memory")
    undetermined = [name for name in left if name not in wide]
    if undetermined:
        share = num_fitted(num_images) / num_images
        enough = max(math.ceil(systems[name].features / systems[name].per_image / share) for name in undetermined)
        lines.append(
            f"{_left(undetermined, systems)}, more than {num_images} images determine; about {enough} images would"
        )
    return lines


def _left(names: list[str], systems: Mapping[str, System]) -> str:
    most = max(systems[name].features for name in names)
    return (
        f"reconstruct leaves {len(names)} of {len(systems)} layers as they are: {few([repr(name) for name in names])} "
        f"with up to {most} weights for each output"
    )
