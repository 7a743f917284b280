"""What run directories say, side by side: a row for each run and ratio, and the sparse models before the cuts."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netslim.launch.config import RunConfig, fixed_fields, to_dict
from netslim.launch.help import known_runs
from netslim.launch.run import (
    METRICS,
    PREEMPTED_MARK,
    SPARSE,
    STAGE_NAMES,
    TRAINED,
    Kind,
    Pass,
    Stage,
    StageName,
    passes_to,
    read_config,
    read_rows,
    why_failed,
)
from netslim.launch.sweep import INDEX, Sweep
from netslim.launch.tables import printable

RESULTS = "results.json"


@dataclass(frozen=True, order=True)
class Task:
    """What a network was trained for: accuracies can be compared where the data sets are the same."""

    data: str
    network: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run at one of its ratios; None is not measured, or not known."""

    run: str
    path: Path
    state: str
    """done; waiting; or incomplete, failed or damaged, a colon, and what is missing or why."""
    task: Task | None = None
    weight: float | None = None
    seed: int | None = None
    ratio: float | None = None
    recipe: str = ""
    """All else that made it: rows that differ in nothing but the seed are the same candidate."""
    accuracy: dict[StageName, float | None] = field(default_factory=dict)
    params: int | None = None
    macs: int | None = None
    file_mb: float | None = None
    seconds: float | None = None
    """Of all its stages together, sparsity training included."""
    config: RunConfig | None = None

    @property
    def finetuned(self) -> float | None:
        return self.accuracy.get("finetuned")

    def stage(self, kind: Kind) -> Path:
        """Where the last pass of a stage left its artefact."""
        assert self.ratio is not None, "only of a damaged or waiting run is it unknown"
        return Stage(kind, Pass(self.ratio)).directory(self.path)


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """A run's model after sparsity training and before any cut."""

    run: str
    path: Path
    """Of the stage's directory, links resolved: runs of a sweep may share it."""
    task: Task
    weight: float
    seed: int
    accuracy: float | None
    params: int | None
    macs: int | None
    file_mb: float | None


@dataclass(frozen=True)
class Gathered:
    """All that the directories say."""

    entries: list[Entry]
    sparse: list[Sparse]
    configs: list[tuple[str, RunConfig]]
    """By the names of the run directories."""
    warnings: list[str]
    """One line each: what is damaged."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A run directory, and what a sweep's index says of it before it is there."""

    path: Path
    name: str
    why_failed: str | None = None
    is_of_sweep: bool = False
    weight: float | None = None
    seed: int | None = None
    ratio: float | None = None


def gather(paths: Sequence[Path]) -> Gathered:
    """Read run directories and sweeps; what is wrong within a run becomes its state and a warning.

    Raises ValueError or FileNotFoundError where there is none, for one that is neither or is named twice, and for a
    damaged sweep.json.
    """
    if not paths:
        raise ValueError("there is nothing to compare; name run directories, as runs/digits, or a sweep's")
    found = Gathered([], [], [], [])
    for place in _named([place for path in paths for place in _places(path)]):
        try:
            _read(place, found)
        except ValueError as error:
            file = next((name for name in ("config.json", RESULTS) if f"/{name} " in str(error)), "a file")
            found.warnings.append(printable(f"{place.name} is left out: {error}"))
            found.entries.append(_bare(place, f"damaged: {file}"))
        except OSError as error:
            found.warnings.append(printable(f"{place.name} is left out: {error.filename}: {error.strerror}"))
            found.entries.append(_bare(place, f"damaged: {Path(error.filename or '').name} ({error.strerror})"))
    shared = {sparse.path: sparse for sparse in reversed(found.sparse)}
    return dataclasses.replace(found, sparse=list(reversed(shared.values())))


def _places(path: Path) -> Iterator[_Place]:
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no directory {path}; name run directories, as runs/digits, or a sweep's; {known_runs(path)}"
        )
    if (path / INDEX).is_file():
        sweep = Sweep.read(path)
        for member in sweep.members:
            why = sweep.why_failed(member)
            yield _Place(path=path / member.name, name=member.name, why_failed=why, is_of_sweep=True, **vars(member))
    elif any((path / name).is_file() for name in ("config.json", RESULTS)):
        yield _Place(path=path, name=path.resolve().name, why_failed=why_failed(path))
    else:
        raise ValueError(f"{path} is neither a run (no config.json) nor a sweep (no {INDEX}); name one, as runs/digits")


def _named(places: Sequence[_Place]) -> list[_Place]:
    """Call each place by the name of its directory, or by its whole path where two directories share that."""
    for path, count in Counter(place.path.resolve() for place in places).items():
        if count > 1:
            raise ValueError(f"{path} is given {count} times; name each run once")
    counts = Counter(place.name for place in places)
    return [place if counts[place.name] == 1 else dataclasses.replace(place, name=str(place.path)) for place in places]


def _bare(place: _Place, state: str) -> Entry:
    return Entry(run=place.name, path=place.path, state=state, weight=place.weight, seed=place.seed, ratio=place.ratio)


def _read(place: _Place, found: Gathered) -> None:
    """Add what one run directory says."""
    is_sparse_only = place.is_of_sweep and place.ratio is None
    trouble = _trouble(place)
    if not (place.path / "config.json").is_file():
        if (place.path / RESULTS).is_file():
            raise ValueError(f"{place.path}/config.json is missing; it says how the run was made")
        if not is_sparse_only or trouble:
            found.entries.append(_bare(place, trouble or "waiting"))
        return
    config = read_config(place.path / "config.json")
    rows = _results(place.path)
    found.configs.append((place.path.resolve().name, config))
    found.sparse.extend(_sparse_of(place, config, rows))
    if not is_sparse_only:
        trouble = trouble or ("waiting" if place.is_of_sweep and not rows else "")
        found.entries.extend(_entry(place, config, rows, ratio, trouble) for ratio in _ratios(place, config, rows))
    elif trouble and not rows:
        found.entries.append(dataclasses.replace(_bare(place, trouble), task=task_of(config), config=config))


def _trouble(place: _Place) -> str:
    """Why a run is not complete, where it left word of that."""
    if place.why_failed is not None:
        return f"failed: {place.why_failed}"
    return "incomplete: preempted" if (place.path / PREEMPTED_MARK).exists() else ""


def _results(path: Path) -> list[dict[str, Any]]:
    if (path / RESULTS).is_file():
        return read_rows(path)
    # a sparse model alone may be another run's: linked, as in a sweep, or copied
    finished = next((found.parent.name for found in path.glob(f"*/{METRICS}") if found.parent.name != "sparse"), None)
    if finished is not None:
        raise ValueError(f"{path / RESULTS} is missing, and {finished} is complete; run it again")
    return []


def task_of(config: RunConfig) -> Task:
    """The data set and the network of a run, in words."""
    data, model = config.data, config.model
    root = "" if data.root is None else f" in {data.root}"
    width = "" if model.width == 1 else f", width {model.width:g}"
    return Task(f"{data.source}{root}, {data.size}x{data.size}", f"{model.name}{width}")


def _sparse_of(place: _Place, config: RunConfig, rows: Sequence[dict[str, Any]]) -> list[Sparse]:
    return [
        Sparse(
            run=place.name,
            path=SPARSE.directory(place.path).resolve(),
            task=task_of(config),
            weight=config.sparsity.weight,
            seed=config.seed,
            **{key: row[key] for key in ("accuracy", "params", "macs", "file_mb")},
        )
        for row in rows
        if row["stage"] == "sparse" and row["ratio"] == 0
    ]


def _ratios(place: _Place, config: RunConfig, rows: Sequence[dict[str, Any]]) -> list[float]:
    """The ratios that a run has, or is to have; not those at which one pass ends and the next begins."""
    if place.ratio is not None:
        return [place.ratio]
    made = {
        row["ratio"]
        for row in rows
        if row["stage"] in {kind.stage_name for kind in TRAINED.values()}
        or (row["stage"] != "sparse" and Stage(Kind.CUT, Pass(row["ratio"])).directory(place.path).is_dir())
    }
    return sorted({*made, *config.prune.ratio})


def _entry(place: _Place, config: RunConfig, rows: Sequence[dict[str, Any]], ratio: float, trouble: str) -> Entry:
    turns = [0.0, *(turn.share for turn in passes_to(ratio, config.prune.passes))]
    own = [row for row in rows if row["ratio"] in turns]
    stages: dict[StageName, dict[str, Any]] = {row["stage"]: row for row in own if row["ratio"] == ratio}
    first = next((row for row in own if row["stage"] == "sparse" and row["ratio"] == 0), None)
    slim = next((stages[stage] for stage in reversed(STAGE_NAMES) if stage != "sparse" and stage in stages), {})
    seconds = [row["seconds"] for row in own]
    stages |= {} if first is None else {"sparse": first}
    return Entry(
        run=place.name,
        path=place.path,
        state=_state(config, set(stages), trouble),
        task=task_of(config),
        weight=config.sparsity.weight,
        seed=config.seed,
        ratio=ratio,
        recipe=json.dumps({**fixed_fields(to_dict(config)), "seed": None}, sort_keys=True),
        accuracy={stage: row["accuracy"] for stage, row in stages.items()},
        **{key: slim.get(key) for key in ("params", "macs", "file_mb")},
        seconds=sum(seconds) if seconds and None not in seconds else None,
        config=config,
    )


def _state(config: RunConfig, stages: set[StageName], trouble: str) -> str:
    """Say done where all the run's stages are there, whatever it left word of before; else what is missing."""
    wanted = [Kind.SPARSE, Kind.CUT, *([Kind.REPAIRED] if config.repair.steps else [])]
    wanted += [TRAINED[start] for start in config.finetune.start]
    missing = ", ".join(kind.prefix for kind in wanted if kind.stage_name not in stages)
    if not missing:
        return "done"
    if trouble.startswith(("failed", "waiting")):
        return trouble
    return f"{trouble}; {missing} missing" if trouble else f"incomplete: {missing} missing"
