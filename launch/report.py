"""What a run came to: results.json for scripts, a table for people."""

import csv
import dataclasses
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from netslim.launch.artefacts import METRICS, read_json, write_json

Stage = Literal["sparse", "cut", "repaired", "finetuned", "finetuned_cut", "scratch"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order of a table's lines and columns."""
_DIRECTORIES = ("sparse", "prune", "repair", "finetune", "scratch")
"""What the names of the stages' directories begin with."""
_Share = Annotated[float, Field(ge=0, le=1)]  # which no NaN is
_Count = Annotated[int, Field(ge=0)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Row:
    """What the table says of a stage; None is not measured."""

    stage: Stage
    ratio: Annotated[float, Field(ge=0, lt=1)]
    accuracy: _Share | None = None
    params: _Count | None = None
    macs: _Count | None = None
    file_mb: _Amount | None = None
    seconds: _Amount | None = None


_COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_FORMATS = {
    "lambda": "{:g}",
    "ratio": "{:.2f}",
    "accuracy": "{:.2%}",
    **{f"accuracy_{stage}": "{:.2%}" for stage in STAGES},
    "change": "{:+.2f}",
    "params": "{:,}",
    "macs": "{:,}",
    "file_mb": "{:.3f}",
    "seconds": "{:.1f}",
}


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
    return sorted(rows, key=lambda row: (row["ratio"], STAGES.index(row["stage"])))


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of results.json as aligned text, one line a stage."""
    return aligned([_COLUMNS, *([cell(column, row[column]) for column in _COLUMNS] for row in rows)])


def cell(column: str, value: Any) -> str:
    """A figure as tables show it; ``-`` where it was not measured."""
    return "-" if value is None else printable(_FORMATS.get(column, "{}").format(value))


def printable(text: str) -> str:
    """Text in which what a terminal would obey, a line's end or a code of colour, is spelt out."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in text)


def aligned(lines: Sequence[Sequence[str]], texts: Sequence[str] = ()) -> str:
    """Cells as text, one line a row, each column as wide as its widest cell; ``texts`` name columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_left = [name in texts for name in lines[0]]
    return "\n".join(
        "  ".join(
            each.ljust(width) if left else each.rjust(width)
            for each, width, left in zip(line, widths, to_left, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]], texts: Sequence[str] = ()) -> str:
    """Cells as a table of GitHub's Markdown, with names on the first line; ``texts`` name columns to the left."""
    head, *rest = lines
    rule = ["---" if name in texts else "---:" for name in head]
    return "\n".join(f"| {' | '.join(each)} |" for each in (head, rule, *([escaped(x) for x in row] for row in rest)))


def escaped(text: str) -> str:
    """Text in which Markdown finds no mark-up."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(text, quote=False))


def csv_text(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, figures in full and empty where there are none; no name of a run is a spreadsheet's formula."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_no_formula(row[column]) for column in columns] for row in rows)
    return file.getvalue()


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = printable(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
