"""Stages meet in directories: the weights and the plan, the configuration, and metrics.json, written last."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from netslim.base import exclusive, is_held, replace_all
from netslim.data import DataInfo
from netslim.launch.config import RunConfig, differences, to_dict
from netslim.launch.mistakes import naming, warn
from netslim.launch.reading import from_dict
from netslim.launch.run.stage import SPARSE
from netslim.launch.tables import printable
from netslim.prune import Origin, Plan, load, save

METRICS = "metrics.json"
INPUT = "input.json"
"""Of a stage: what its network takes and tells apart: how images become squares, their size and statistics, and the
names of the classes."""
PREEMPTED_MARK = "preempted"
"""In a run's directory: a signal stopped it after a checkpoint. Exit codes do not pass through every launcher."""
STOP_MARK = "stop"
"""In a run's directory: where a batch script says that the run is to save and end."""
FAILED_MARK = "failed"
"""In a run's directory: why the last attempt ended, in one line, where nobody is there to read it from a terminal."""
_LONGEST_REASON = 200  # characters
_LARGEST_JSON = 1 << 24  # bytes; a configuration has two thousand


def is_complete(directory: Path) -> bool:
    """Whether a stage finished here: its metrics.json, the last file it writes, is there.

    Raises ValueError where it is damaged: now, and not when the results are written after the stages that follow.
    """
    if not (directory / METRICS).is_file():
        return False
    read_json(directory / METRICS)
    return True


def write_stage(
    directory: Path,
    model: nn.Module,
    plan: Plan | None,
    origin: Origin,
    images: DataInfo,
    config: RunConfig,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Leave what a finished stage gives; returns the metrics with ``file_mb``, the weights' size in 10^6 bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    save(model, plan, directory, origin if plan is None else None)  # which a plan has
    about = {"classes": images.classes, **asdict(config.data.reading), "mean": images.mean, "std": images.std}
    write_json(directory / INPUT, about)
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


def config_of_run(directory: Path) -> RunConfig:
    """Read the configuration of a run, or of one of its stages; ValueError or OSError naming the file at fault."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no run: it has no config.json")
    return read_config(path)


def preset_of_run(directory: Path) -> str:
    """The preset that a run was made by; raises as `config_of_run` does, and ValueError where the file names none."""
    config_of_run(directory)
    preset = read_json(directory / "config.json").get("preset")
    if not isinstance(preset, str):
        raise ValueError(f"{directory / 'config.json'} names no preset; name a run directory, not one of its stages")
    return preset


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Written aside and renamed, so that the file is whole or not there."""
    replace_all(path.parent, {path.name: json.dumps(values, indent=2).encode()})


def why_failed(directory: Path) -> str | None:
    """What the last attempt of a run left word of, in one line; None where it did not fail."""
    if not (directory / FAILED_MARK).is_file():
        return None
    with (directory / FAILED_MARK).open(encoding="utf-8", errors="replace") as file:
        return printable(file.readline(_LONGEST_REASON).strip()) or "it does not say why"


@contextmanager
def occupied(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, until this one ends or dies; raises ValueError where one is at work.

    A file system without locks cannot keep them out, which is said.
    """
    with ExitStack() as held:
        try:
            is_kept = held.enter_context(exclusive(directory / ".lock", wait=False))
        except BlockingIOError:
            raise ValueError(
                f"{directory} is in use by another run; wait until it has ended, or use another --run-dir"
            ) from None
        if not is_kept:
            warn(
                f"the file system of {directory} has no locks, so that nothing keeps another run out of it: "
                "start none there before this one has ended"
            )
        yield


def is_occupied(directory: Path) -> bool:
    """Whether a run is at work in a directory, as far as this machine can see; it may be somebody else's."""
    lock = directory / ".lock"
    return lock.is_file() and is_held(lock)  # a pipe of this name would never open


def claim(directory: Path, preset: str, config: RunConfig) -> None:
    """Make the run directory, or check that its stages were made with the same configuration; keeps config.json.

    Raises ValueError as `check_same`, and OSError, which names ``--run-dir``, where the directory can't be written.
    """
    check_same(directory, config)
    with naming("--run-dir", directory):
        directory.mkdir(parents=True, exist_ok=True)
        for mark in (PREEMPTED_MARK, FAILED_MARK):
            (directory / mark).unlink(missing_ok=True)
        write_json(directory / "config.json", {"preset": preset, **to_dict(config)})


def check_same(directory: Path, config: RunConfig) -> None:
    """Raise ValueError, which lists the fields that differ, where a run was made with another configuration.

    What no stage has read yet may still change: how to prune until the first cut, how to repair until the first repair,
    how to fine-tune until that. So a sparse model that is copied into another directory can be pruned by other rules.
    """
    path, sparse = directory / "config.json", SPARSE.directory(directory)
    # a run that ended before its first stage began holds nothing that another configuration would mix with
    before = path if path.is_file() else sparse / "config.json"
    if sparse.is_dir() and before.is_file():
        differing = differences(to_dict(read_config(before)), to_dict(config), _unread(directory))
        if differing:
            raise ValueError(
                f"{directory} was made with another configuration: {'; '.join(differing)}. "
                "Use the same values, another --run-dir, or delete the directory"
            )


def _unread(directory: Path) -> list[str]:
    """The sections of the configuration that no stage in a run's directory has read."""
    begun = {path.name.split("-")[0] for path in directory.iterdir() if path.is_dir()}
    is_trained = bool(begun & {"finetune", "scratch"})
    is_read = {
        # sparsity training penalises the gammas that can go
        "prune": "prune" in begun or not is_complete(SPARSE.directory(directory)),
        "repair": is_trained or "repair" in begun,
        "finetune": is_trained,
    }
    return [section for section, already in is_read.items() if not already]
