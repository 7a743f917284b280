"""Makes docs/performance.md of the benchmarks' figures in docs/performance/, and docs/networks.md of the zoo's.

python tests/bench/performance.py
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from results import Cell, shown

DOCS = Path(__file__).parents[2] / "docs"
PAGE, FIGURES = DOCS / "performance.md", DOCS / "performance"
NETWORKS, ZOO = DOCS / "networks.md", DOCS / "networks.json"
KEYS = ("title", "about", "command", "machine", "versions", "day", "headlines", "tables")
HEAD = """# Performance

What netslim costs and saves, each figure beside what it is compared with. This page is made by
`tests/bench/performance.py` of the figures in `docs/performance/`; `make bench` measures them again. What is compared
takes turns, so that a busy machine slows all alike; figures are medians."""

NETWORKS_HEAD = """# Networks

What netslim makes of the networks that people have, by itself: no network is named in its code. The page is made by
`tests/bench/performance.py` of the figures that `make zoo` leaves."""


def read_figures(file: Path) -> dict[str, Any]:
    """What one benchmark left; raises ValueError where something is missing."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise ValueError(
            f"{file} has no {', '.join(missing)}; write it by tests/bench/{file.stem}.py --json {file.name}"
        )
    return found


def make_page(files: Iterable[Path]) -> str:
    """The page's text: first what every benchmark came to, then each benchmark, in the order of the files' names."""
    figures = {file.stem: read_figures(file) for file in sorted(files, key=lambda file: file.name)}
    summary = [
        [f"[{found['title']}](#{name})", headlines(found), found["machine"], found["day"]]
        for name, found in figures.items()
    ]
    top = as_markdown(["benchmark", "what it came to", "machine", "day"], summary)
    return "\n\n".join([HEAD, top, *(section(name, found) for name, found in figures.items())]) + "\n"


def make_networks_page(file: Path) -> str:
    """The text of the page of networks: what all came to, then a line for each."""
    found = read_figures(file)
    counts = as_markdown(["of all", "figure"], [[each["name"], shown(each["value"])] for each in found["headlines"]])
    return f"{NETWORKS_HEAD}\n\n{counts}\n\n{section(file.stem, found)}\n"


def headlines(found: dict[str, Any]) -> str:
    return "<br>".join(f"{each['name']}: **{shown(each['value'])}**" for each in found["headlines"])


def section(name: str, found: dict[str, Any]) -> str:
    tables = [part for each in found["tables"] for part in (as_markdown(each["columns"], each["rows"]), each["note"])]
    measured = f"Measured on {found['day']}: {found['machine']}; {found['versions']}."
    parts = [f'<a id="{name}"></a>', f"## {found['title']}", found["about"], *filter(None, tables)]
    return "\n\n".join([*parts, f"```\n{found['command']}\n```", measured])


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table; columns of numbers to the right."""
    is_text = [all(isinstance(row[at], str) for row in rows) for at in range(len(columns))]
    lines = [columns, ["---" if text else "---:" for text in is_text], *([shown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    files = list(FIGURES.glob("*.json"))
    PAGE.write_text(make_page(files), encoding="utf-8")
    NETWORKS.write_text(make_networks_page(ZOO), encoding="utf-8")
    print(f"{PAGE}: {len(files)} benchmarks; {NETWORKS}")


if __name__ == "__main__":
    main()
