"""`netslim run digits`, shortened, in processes of its own: how it is started, and what it leaves."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

SCRIPT = Path(sys.executable).with_name("netslim")
SHORT = [
    *("--sparsify.epochs", "3", "--finetune.epochs", "1", "--model.width", "0.125", "--data.size", "16"),
    *("--checkpoint.steps", "5", "--prune.ratio", "0.5", "0.9"),
]
ONE_RATIO = ["--prune.ratio", "0.5"]
"""After those of SHORT: a run that ends sooner."""


def stages(*ratios: float) -> list[str]:
    """The directories of a run with these ratios, in the order in which it makes them."""
    return ["sparse", *(f"{stage}-{ratio:.2f}" for ratio in ratios for stage in ("prune", "repair", "finetune"))]


STAGES = stages(0.5, 0.9)


def call(*arguments: object, timeout: float = 800, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **environment},
    )


def results(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return values


def alive(directory: Path) -> list[str]:
    """Processes of a run that have not ended, by its directory: the launcher gives each rank a session of its own."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(directory) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found
