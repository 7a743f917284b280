"""What a run came to: results.json for scripts, a table for people."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from netslim.base import complaint
from netslim.launch.run.directory import METRICS, read_json, write_json
from netslim.launch.run.stage import STAGE_NAMES, Kind, StageName
from netslim.launch.tables import aligned, cell

_PREFIXES = {kind.prefix for kind in Kind}
_Share = Annotated[float, Field(ge=0, le=1)]  # which no NaN is
_Count = Annotated[int, Field(ge=0)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Row:
    """What the table says of a stage; None is not measured."""

    stage: StageName
    ratio: Annotated[float, Field(ge=0, lt=1)]
    accuracy: _Share | None = None
    params: _Count | None = None
    macs: _Count | None = None
    file_mb: _Amount | None = None
    seconds: _Amount | None = None


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
        raise ValueError(f"{path} is damaged ({complaint(error)}); delete its directory to make it again") from None


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = [
        dataclasses.asdict(read_row(path))
        for path in directory.glob(f"*/{METRICS}")
        if path.parent.name.split("-")[0] in _PREFIXES
    ]
    return sorted(rows, key=lambda row: (row["ratio"], STAGE_NAMES.index(row["stage"])))


def format_results(directory: Path) -> str:
    """What a run came to, for its last lines: the table, and where the figures are for scripts."""
    return f"{format_table(read_rows(directory))}\n{directory}/results.json"


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of results.json as aligned text, one line a stage."""
    return aligned([_COLUMNS, *([cell(column, row[column]) for column in _COLUMNS] for row in rows)])
