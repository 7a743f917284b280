"""What a run came to: results.json for scripts, a table for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netslim.launch.artefacts import METRICS, read_json, write_json

_COLUMNS = ("stage", "ratio", "accuracy", "params", "macs", "file_mb", "seconds")
_STAGES = {"sparse": "sparse", "prune": "cut", "finetune": "finetuned"}


def write_results(directory: Path, **about: Any) -> None:
    """Write results.json: ``about`` the run, and a row for each finished stage. Figures not measured are null."""
    write_json(directory / "results.json", {**about, "rows": _rows(directory)})


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = [
        {column: read_json(path).get(column) for column in _COLUMNS}
        for path in directory.glob(f"*/{METRICS}")
        if path.parent.name.split("-")[0] in _STAGES
    ]
    order = list(_STAGES.values())
    return sorted(rows, key=lambda row: (row["ratio"], order.index(row["stage"])))


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of results.json as aligned text, one line a stage."""
    formats = {
        "ratio": "{:.2f}",
        "accuracy": "{:.2%}",
        "params": "{:,}",
        "macs": "{:,}",
        "file_mb": "{:.3f}",
        "seconds": "{:.1f}",
    }
    return aligned(
        [_COLUMNS, *([_cell(row[column], formats.get(column, "{}")) for column in _COLUMNS] for row in rows)]
    )


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as text, one line a row, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)
