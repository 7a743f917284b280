"""Figures as text: aligned for a terminal, as Markdown, as CSV."""

import csv
import html
import io
import re
from collections.abc import Sequence
from typing import Any

_FORMATS = {
    "lambda": "{:g}",
    "ratio": "{:.2f}",
    "accuracy": "{:.2%}",
    "change": "{:+.2f}",
    "params": "{:,}",
    "macs": "{:,}",
    "file_mb": "{:.3f}",
    "seconds": "{:.1f}",
}


def cell(column: str, value: Any) -> str:
    """A figure as tables show it; ``-`` where it was not measured."""
    if value is None:
        return "-"
    kind = "accuracy" if column.startswith("accuracy_") else column
    return printable(_FORMATS.get(kind, "{}").format(value))


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
