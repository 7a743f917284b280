"""Figures of |gamma| as a table: aligned for a terminal, and as HTML for a notebook."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from typing import Any

from netslim.prune.map import aligned

Row = dict[str, Any]
"""Of one BatchNorm, as `Gammas` describes it."""

_COLUMNS = {
    "layer": ("layer", "{}"),
    "channels": ("channels", "{}"),
    "removable": ("can go", "{}"),
    "num_below": ("below", "{}"),
    "smallest": ("smallest", "{:.3g}"),
    "median": ("median", "{:.3g}"),
    "largest": ("largest", "{:.3g}"),
    "below_1e-2": ("< 1e-2", "{:.0%}"),
    "below_1e-3": ("< 1e-3", "{:.0%}"),
}
"""Keys of a row, each with its head and form in the table."""
_BARS, _ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
"""From none to the most."""


def gammas_as_text(rows: Sequence[Row]) -> str:
    """Give a line for each row, with histograms in what signs the terminal can show."""
    return "\n".join(aligned(_cells(rows, _bars()), "<>>>>>>>><"))


def gammas_as_html(rows: Sequence[Row], below: Sequence[str]) -> str:
    """Give a table of the rows, and lines below it."""
    head, *lines = _cells(rows, _BARS)
    table = "".join([_html_row("th", head), *(_html_row("td", line) for line in lines)])
    return f"<table>{table}</table>" + "".join(f"<p>{html.escape(line)}</p>" for line in below)


def threshold_line(rows: Sequence[Row], ratio: float, threshold: float | None) -> str:
    """Say where the threshold of a ratio lies, and how many channels it takes."""
    count = sum(row["channels"] if row["removable"] is None else row["removable"] for row in rows)
    limit = "none" if threshold is None else f"{threshold:.3g}"
    taken = sum(row["num_below"] for row in rows)
    return f"threshold of ratio {ratio:g}: |gamma| {limit}, which takes {taken} of {count} channels"


def _cells(rows: Sequence[Row], bars: str) -> list[list[str]]:
    """Give the cells of each line, the head first; a dash stands for what was not asked for."""
    lines = [
        ["-" if row[key] is None else form.format(row[key]) for key, (_, form) in _COLUMNS.items()] for row in rows
    ]
    head = [title for title, _ in _COLUMNS.values()]
    spread = [_sparkline(row["histogram"], bars) for row in rows]
    return [[*head, "|gamma|"], *([*line, each] for line, each in zip(lines, spread, strict=True))]


def _html_row(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"


def _sparkline(counts: Sequence[int], bars: str) -> str:
    most = max(counts) or 1
    return "".join(bars[-(-count * (len(bars) - 1) // most)] for count in counts)


def _bars() -> str:
    try:
        _BARS.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return _ASCII_BARS
    return _BARS
