"""What the figures of a comparison are drawn from, beyond its table: epochs, gammas, thresholds, channels kept."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from netslim.launch.compare.choice import Verdict
from netslim.launch.compare.entries import Entry, Gathered, Sparse
from netslim.launch.run import METRICS, Kind, read_json
from netslim.launch.tables import printable
from netslim.prune import load_plan

_LARGEST_LOG = 1 << 26  # bytes; an epoch's line has some 600
_NORM, _GAMMA = ".running_mean", ".weight"
Epochs = tuple[tuple[int, ...], tuple[float, ...]]
From = TypeVar("From", Sparse, Entry)
To = TypeVar("To")


@dataclass(frozen=True)
class Curve:
    """Accuracy after each epoch that was measured."""

    source: Sparse | Entry
    epochs: tuple[int, ...]
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Cut:
    """What each layer of a run keeps, in the order of execution."""

    entry: Entry
    layers: tuple[tuple[str, int, int], ...]
    """Name, channels before, channels after."""


@dataclass(frozen=True)
class Drawn:
    """What there is to draw of one data set and network."""

    verdict: Verdict
    sparsify: list[Curve]
    finetune: list[Curve]
    gammas: dict[float, NDArray[np.float64]]
    """|gamma| of every BatchNorm of the sparse models, all seeds together, by lambda."""
    thresholds: list[tuple[Entry, float]]
    """Of |gamma|: no greater ones were kept."""
    latencies: list[tuple[Entry, float]]
    """Milliseconds for one image, as the run measured them on its own device."""
    cuts: list[Cut]
    troubles: list[str]
    """A line each: what is damaged, and so left out."""

    def is_chosen(self, source: Sparse | Entry) -> bool:
        named = self.verdict.named
        return named is not None and any(source is entry for entry in named.entries)


def read_drawn(verdict: Verdict, found: Gathered) -> Drawn:
    """Read what the figures need; what is not there is left out, and what is damaged is named too."""
    troubles: list[str] = []

    def read_each(read: Callable[[From], To | None], sources: list[From]) -> list[tuple[From, To]]:
        done: list[tuple[From, To]] = []
        for source in sources:
            try:
                value = read(source)
            except (ValueError, OSError) as error:
                troubles.append(printable(f"{source.run}: {' '.join(str(error).split())}"))
                continue
            done += [] if value is None else [(source, value)]
        return done

    sparse = [each for each in found.sparse if each.task == verdict.task]
    entries = [each for each in found.entries if each.task == verdict.task and each.ratio is not None]
    gammas: dict[float, list[NDArray[np.float64]]] = {}
    for model, values in read_each(lambda model: read_gammas(model.path / "weights.safetensors"), sparse):
        gammas.setdefault(model.weight, []).append(values)
    return Drawn(
        verdict=verdict,
        sparsify=[Curve(model, *curve) for model, curve in read_each(lambda model: read_epochs(model.path), sparse)],
        finetune=[Curve(entry, *curve) for entry, curve in read_each(_finetuning, entries)],
        gammas={weight: np.concatenate(gammas[weight]) for weight in sorted(gammas)},
        thresholds=read_each(_threshold, entries),
        latencies=read_each(_latency, entries),
        cuts=[Cut(*each) for each in read_each(_layers, entries)],
        troubles=troubles,
    )


def read_epochs(stage: Path) -> Epochs | None:
    """Epochs and the accuracies after them; None where there is no log. Raises ValueError naming a damaged one."""
    path = stage / "metrics.jsonl"
    if not path.is_file():
        return None
    if path.stat().st_size > _LARGEST_LOG:
        raise ValueError(f"{path} is too large for a log of epochs")
    # without its end the last line is still being written
    lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    try:
        found = [(int(line["epoch"]), float(line["accuracy"])) for line in map(json.loads, lines)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); its curve is left out") from None
    return (tuple(epoch for epoch, _ in found), tuple(accuracy for _, accuracy in found)) if found else None


def read_gammas(weights: Path) -> NDArray[np.float64] | None:
    """|gamma| of every BatchNorm in a file of weights; None where there is none. Raises ValueError where damaged.

    A BatchNorm is what has running statistics beside its scale.
    """
    if not weights.is_file():
        return None
    try:
        with safe_open(weights, framework="np") as file:
            names = set(file.keys())
            scales = [name.removesuffix(_NORM) + _GAMMA for name in sorted(names) if name.endswith(_NORM)]
            values = [np.abs(file.get_tensor(name)).ravel() for name in scales if name in names]
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{weights} is damaged ({error}); its gammas are left out") from None
    return np.concatenate(values).astype(np.float64) if values else None


def _finetuning(entry: Entry) -> Epochs | None:
    return read_epochs(entry.stage(Kind.FINETUNED))


def _threshold(entry: Entry) -> float | None:
    """Where the cut fell; None where it ranked by something else than |gamma|, or came after other passes."""
    path = entry.stage(Kind.CUT) / METRICS
    config = entry.config
    if config is None or config.prune.score != "gamma" or config.prune.passes > 1 or not path.is_file():
        return None
    threshold = read_json(path).get("threshold")
    if threshold is not None and not isinstance(threshold, float | int):
        raise ValueError(f"{path} is damaged (threshold is {threshold!r}); it is left out")
    return threshold


def _latency(entry: Entry) -> float | None:
    path = entry.stage(Kind.FINETUNED) / METRICS
    found = read_json(path).get("latency_ms_1") if path.is_file() else None
    if found is not None and not (isinstance(found, float | int) and found > 0):
        raise ValueError(f"{path} is damaged (latency_ms_1 is {found!r}); it is left out")
    return found


def _layers(entry: Entry) -> tuple[tuple[str, int, int], ...] | None:
    plan = load_plan(entry.stage(Kind.CUT))
    return None if plan is None else tuple((each.name, each.width, len(each.kept)) for each in plan.layers)
