"""Stages meet in directories: the weights and the plan, the configuration, and metrics.json, written last."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from netslim.data.lock import exclusive
from netslim.launch.config import RunConfig, Start, differences, from_dict, to_dict
from netslim.prune import Plan, load, save
from netslim.prune.artefact import replace_all

METRICS = "metrics.json"
PREEMPTED_MARK = "preempted"
"""In a run's directory: a signal stopped it after a checkpoint. Exit codes do not pass through every launcher."""
STOP_MARK = "stop"
"""In a run's directory: where a batch script says that the run is to save and end."""
FAILED_MARK = "failed"
"""In a run's directory: why the last attempt ended, in one line, where nobody is there to read it from a terminal."""
STAGES = ("sparsify", "prune", "repair", "finetune")
"""The commands that make a stage, in their order."""
STARTS: dict[Start, str] = {"slim": "finetune", "cut": "finetune-cut", "scratch": "scratch"}
"""The stage that trains from each start."""
_LARGEST_JSON = 1 << 24  # bytes; a configuration has two thousand


@dataclass(frozen=True)
class Pass:
    """One of the rounds of sparsity training and pruning by which a network comes to a ratio."""

    ratio: float
    """That the last of them reaches."""
    number: int = 1
    count: int = 1

    @property
    def share(self) -> float:
        """The share of all channels that is gone after this pass: each takes the same share of what is left."""
        return self.ratio if self.is_last else 1 - (1 - self.ratio) ** (self.number / self.count)

    @property
    def is_last(self) -> bool:
        return self.number == self.count

    @property
    def before(self) -> "Pass":
        """The pass before this one."""
        return replace(self, number=self.number - 1)


def passes_to(ratio: float, count: int) -> list[Pass]:
    """The passes by which a network comes to a ratio, in their order."""
    return [Pass(ratio, number, count) for number in range(1, count + 1)]


def stage_directory(run_directory: Path, stage: str, turn: Pass | None = None) -> Path:
    """Where a stage leaves its artefact: sparse, prune-0.50, finetune-0.50, and in earlier passes prune-0.50-pass-1.

    The first sparsity training is the same for all ratios.
    """
    if stage == "sparsify" and (turn is None or turn.number == 1):
        return run_directory / "sparse"
    assert turn is not None, "only the first sparsity training is of no ratio"
    # two decimals sort and align; a ratio that has more keeps them
    name = f"{stage.replace('sparsify', 'sparse')}-{max(f'{turn.ratio:.2f}', str(turn.ratio), key=len)}"
    return run_directory / (name if turn.is_last and stage != "sparsify" else f"{name}-pass-{turn.number}")


def stage_directories(run_directory: Path, stages: Sequence[str], config: RunConfig) -> list[Path]:
    """Where these commands leave their artefacts, in the order in which a run makes them."""
    found = []
    for ratio in config.prune.ratio:
        for turn in passes_to(ratio, config.prune.passes):
            found += [(stage, turn) for stage in stages if stage != "finetune"]
        if "finetune" in stages:
            found += [(STARTS[start], Pass(ratio)) for start in config.finetune.start]
    return list(dict.fromkeys(stage_directory(run_directory, *each) for each in found))


def is_complete(directory: Path) -> bool:
    """Whether a stage finished here: its metrics.json, the last file it writes, is there.

    Raises ValueError where it is damaged: now, and not when the results are written after the stages that follow.
    """
    if not (directory / METRICS).is_file():
        return False
    read_json(directory / METRICS)
    return True


def write_stage(
    directory: Path, model: nn.Module, plan: Plan | None, config: RunConfig, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Leave what a finished stage gives; returns the metrics with ``file_mb``, the weights' size in 10^6 bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    save(model, plan, directory)
    write_json(directory / "config.json", to_dict(config))
    size = (directory / "weights.safetensors").stat().st_size
    metrics = {**metrics, "file_mb": size / 1e6}
    write_json(directory / METRICS, metrics)
    return metrics


def read_stage(directory: Path, build: Callable[[], nn.Module], command: str) -> nn.Module:
    """The model a finished stage left; raises FileNotFoundError that names the command which makes it."""
    if not is_complete(directory):
        raise FileNotFoundError(f"{directory} holds no finished stage; run `{command}` first")
    return load(directory, build)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError that names the file where it holds no JSON object."""
    try:
        if path.stat().st_size > _LARGEST_JSON or not path.is_file():  # a pipe or a device might never end
            raise ValueError("it is too large, or no file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its directory to make it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (no JSON object); delete its directory to make it again")
    return values


def read_config(path: Path) -> RunConfig:
    """Read a config.json that a run or a stage left; raises ValueError or OSError naming the file."""
    return from_dict({key: value for key, value in read_json(path).items() if key != "preset"}, str(path))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Written aside and renamed, so that the file is whole or not there."""
    replace_all(path.parent, {path.name: json.dumps(values, indent=2).encode()})


@contextmanager
def occupied(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, until this one ends or dies; raises ValueError where one is at work."""
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(directory / ".lock", wait=False))
        except BlockingIOError:
            raise ValueError(
                f"{directory} is in use by another run; wait until it has ended, or use another --run-dir"
            ) from None
        yield


def claim(directory: Path, preset: str, config: RunConfig) -> None:
    """Make the run directory, or check that its stages were made with the same configuration; keeps config.json.

    What no stage has read yet may still change: how to prune until the first cut, how to repair until the first repair,
    how to fine-tune until that. So a sparse model that is copied into another directory can be pruned by other rules.

    Raises ValueError that lists the fields which differ, and OSError where the directory can't be written.
    """
    path = directory / "config.json"
    values = {"preset": preset, **to_dict(config)}
    sparse = stage_directory(directory, "sparsify")
    # a run that ended before its first stage began holds nothing that another configuration would mix with
    before = path if path.is_file() else sparse / "config.json"
    if sparse.is_dir() and before.is_file():
        differing = differences(to_dict(read_config(before)), to_dict(config), _unread(directory))
        if differing:
            raise ValueError(
                f"{directory} was made with another configuration: {'; '.join(differing)}. "
                "Use the same values, another --run-dir, or delete the directory"
            )
    directory.mkdir(parents=True, exist_ok=True)
    for mark in (PREEMPTED_MARK, FAILED_MARK):
        (directory / mark).unlink(missing_ok=True)
    write_json(path, values)


def _unread(directory: Path) -> list[str]:
    """The sections of the configuration that no stage in a run's directory has read."""
    begun = {path.name.split("-")[0] for path in directory.iterdir() if path.is_dir()}
    is_trained = bool(begun & {"finetune", "scratch"})
    is_read = {
        # sparsity training penalises the gammas that can go
        "prune": "prune" in begun or not is_complete(stage_directory(directory, "sparsify")),
        "repair": is_trained or "repair" in begun,
        "finetune": is_trained,
    }
    return [section for section, already in is_read.items() if not already]
