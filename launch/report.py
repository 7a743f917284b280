"""What a run came to: results.json for scripts, a table for people."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from netslim.launch.artefacts import METRICS, read_json, write_json

Stage = Literal["sparse", "cut", "repaired", "finetuned", "finetuned_cut", "scratch"]
_STAGES: tuple[Stage, ...] = get_args(Stage)
_DIRECTORIES = ("sparse", "prune", "repair", "finetune", "scratch")
"""What the names of the stages' directories begin with."""


@dataclass(frozen=True)
class Row:
    """What the table says of a stage; None is not measured."""

    stage: Stage
    ratio: float
    accuracy: float | None = None
    params: int | None = None
    macs: int | None = None
    file_mb: float | None = None
    seconds: float | None = None


_COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def write_results(directory: Path, **about: Any) -> None:
    """Write results.json: ``about`` the run, and a row for each finished stage. Figures not measured are null."""
    write_json(directory / "results.json", {**about, "rows": _rows(directory)})


def read_row(path: Path) -> Row:
    """What a stage's metrics.json says; ValueError that names the file where that is not what was written."""
    return _checked(read_json(path), path)


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of results.json; ValueError that names the file where they are not what was written."""
    path = directory / "results.json"
    rows = read_json(path).get("rows")
    return [dataclasses.asdict(_checked(row, path)) for row in (rows if isinstance(rows, list) else [rows])]


def _checked(values: Any, path: Path) -> Row:
    try:
        return TypeAdapter(Row).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise ValueError(f"{path} is damaged ({what}); delete its directory to make it again") from None


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = [
        dataclasses.asdict(read_row(path))
        for path in directory.glob(f"*/{METRICS}")
        if path.parent.name.split("-")[0] in _DIRECTORIES
    ]
    return sorted(rows, key=lambda row: (row["ratio"], _STAGES.index(row["stage"])))


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
