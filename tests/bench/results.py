"""What every benchmark gives: tables of figures, with the machine, the versions and the command that measured them."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

PACKAGES = ("torch", "torchvision", "accelerate", "deepspeed", "ffcv", "onnxruntime", "torch-pruning")
Cell = str | int | float | None
"""None: not measured."""
T = TypeVar("T")


@dataclass
class Results:
    """The figures of one benchmark: printed as they come, and kept as JSON, of which docs/performance.md is made."""

    title: str
    about: str
    """What is compared with what, and how; a sentence or more."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    headlines: list[dict[str, Any]] = field(default_factory=list)

    def headline(self, name: str, value: Cell) -> None:
        """Mark a figure, most often a ratio, for the table at the top of docs/performance.md, and print it."""
        self.headlines.append({"name": name, "value": value})
        print(f"{name}: {shown(value)}\n", flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> None:
        """Add a table and print it; ``note`` says what of it a reader should not miss."""
        self.tables.append({"columns": list(columns), "rows": [list(row) for row in rows], "note": note})
        for line in as_text([list(columns), *([shown(cell) for cell in row] for row in rows)]):
            print(line)
        print(f"{note}\n" if note else "", flush=True)

    def finish(self, file: Path | None) -> None:
        """Say where it was measured, and write everything to ``file``."""
        kept = {
            "title": self.title,
            "about": " ".join(self.about.split()),
            "command": _command(),
            "machine": machine(),
            "versions": versions(),
            "day": time.strftime("%Y-%m-%d"),
            "headlines": self.headlines,
            "tables": self.tables,
        }
        print(f"{kept['machine']}; {kept['versions']}")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """The benchmark's command line: its description, and where the figures go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures, of which docs/performance.md is made")
    return parser


def take_turns(contestants: Mapping[str, Callable[[], T]], repetitions: int, *, warm_up: int = 0) -> dict[str, list[T]]:
    """What each contestant returns in each repetition; they take turns, so that a busy machine slows all alike.

    The order is turned round every time, since the first to run finds colder caches.
    """
    found: dict[str, list[T]] = {name: [] for name in contestants}
    for repetition in range(warm_up + repetitions):
        for name in list(contestants)[:: -1 if repetition % 2 else 1]:
            value = contestants[name]()
            if repetition >= warm_up:
                found[name].append(value)
    return found


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """How long one call takes, of so many in a row; on a GPU, until it has done what it was given."""
    started = _now()
    for _ in range(times):
        work()
    return (_now() - started) / times


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def machine() -> str:
    """The processor, how many cores of it this process may use, and the GPU if there is one."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{processor}, {len(os.sched_getaffinity(0))} cores{gpu}"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def shown(cell: Cell) -> str:
    """A figure as a reader wants it: three digits, or three behind the point for a ratio near 1; thousands apart."""
    if cell is None:
        return "not measured"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3f}" if 0.95 <= abs(cell) < 1.05 else f"{cell:.3g}"


def as_text(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    sides = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _command() -> str:
    """This process's own, but for files that take what is found."""
    words = ["python", os.path.relpath(sys.argv[0]), *(word for word in sys.argv[1:] if not word.startswith("--json="))]
    for flag in ("--json", "--log"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    return " ".join(word.replace(str(Path.home()), "~") for word in words)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
