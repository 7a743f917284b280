"""The command ``netslim compare``: runs side by side, which network to take, and a page with the figures."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from netslim.launch.compare.choice import Size, Verdict, judge, notes
from netslim.launch.compare.entries import Entry, Gathered, gather
from netslim.launch.mistakes import naming, warn
from netslim.launch.reading import read_flags
from netslim.launch.run import STAGE_NAMES
from netslim.launch.tables import aligned, cell, csv_text, escaped, markdown, printable

Format = Literal["table", "csv", "json", "markdown"]
PREFIX = "accuracy_"
_TEXTS = ("run", "data", "network", "state")
_ALWAYS = ("sparse", "cut", "repaired", "finetuned")
"""Accuracies that have a column also where no run has them."""
_LEFT = "run"
_MOST_NAMES = 3


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CompareConfig:
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run directories, as runs/digits, and directories of sweeps."""
    format: Format = "table"
    """What is printed; with csv and json nothing else is."""
    sort: str | None = None
    """Column by which the rows are sorted; None is by data set, network, lambda, ratio and seed."""
    reverse: bool = False
    """Sort from large to small; rows without a value stay last."""
    within: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Accuracy that may be lost against the baseline: the smallest network that loses no more is chosen."""
    smallest_by: Size = "params"
    """What the chosen network has least of."""
    out: Path | None = None
    """Where the page goes; None is report.html in the one directory given, or comparison.html here."""
    figures: bool = False
    """Write each figure also as SVG and PNG, into a directory beside the page."""
    wandb: bool = False
    """Save a view of the runs in Weights & Biases, and print its address."""


def compare_runs(arguments: Sequence[str], description: str = "runs side by side") -> int:
    """Compare runs from their directories alone: print the table and the choice, and write the page.

    Raises ValueError or OSError for what is no run, and where the page can't be written.
    """
    config = read_flags(CompareConfig, arguments or ["--help"], prog="netslim compare", description=description)
    out = _page_path(config)
    found = gather(config.runs)
    verdicts = judge(found, config.within, config.smallest_by)
    columns = columns_of(found.entries)
    rows = sort_rows(rows_of(found.entries, verdicts), columns, config.sort, config.reverse)
    for warning in found.warnings:
        warn(warning)
    print(_text(config.format, found, verdicts, columns, rows), flush=True)
    beside = sys.stdout if config.format == "table" else sys.stderr
    try:
        with naming("--out", out.absolute().parent):
            warnings = _write_page(out, config, found, verdicts, rows)
    except OSError as error:  # runs may be somebody else's: they are compared all the same
        if config.out is not None:
            raise
        warn(f"the page is not written: {error.strerror}")
    else:
        for warning in warnings:
            warn(warning)
        print(printable(str(out)), file=beside, flush=True)
    if config.wandb:
        print(f"W&B workspace: {_save_workspace(found, config.runs)}", file=beside)
    return 0


def _page_path(config: CompareConfig) -> Path:
    alone = config.runs[0] / "report.html" if len(config.runs) == 1 else Path("comparison.html")
    out = config.out or alone
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory; name a file")
    if config.out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.parent}; make it first")
    return out


def columns_of(entries: Sequence[Entry]) -> list[str]:
    """The names of all columns, in their order; accuracies that no run has are left out."""
    made = {stage for entry in entries for stage in entry.accuracy}
    accuracies = [f"{PREFIX}{stage}" for stage in STAGE_NAMES if stage in made or stage in _ALWAYS]
    about = ["run", "data", "network", "lambda", "seed", "ratio"]
    return [*about, *accuracies, "change", "params", "macs", "file_mb", "seconds", "state"]


def rows_of(entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The rows of the table, figures in full, None where they were not measured."""
    by_task = {verdict.task: verdict for verdict in verdicts}
    chosen = {id(each) for verdict in verdicts if verdict.chosen is not None for each in verdict.chosen.entries}
    columns = columns_of(entries)
    rows = []
    for entry in entries:
        verdict = None if entry.task is None else by_task[entry.task]
        values = {
            "run": entry.run,
            "data": None if entry.task is None else entry.task.data,
            "network": None if entry.task is None else entry.task.network,
            "lambda": entry.weight,
            **{f"{PREFIX}{stage}": entry.accuracy.get(stage) for stage in STAGE_NAMES},
            "change": None if verdict is None else verdict.change(entry),
            **{name: getattr(entry, name) for name in ("seed", "ratio", "params", "macs", "file_mb", "seconds")},
            "state": entry.state,
        }
        rows.append({**{name: values[name] for name in columns}, "chosen": id(entry) in chosen})
    return rows


def sort_rows(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], by: str | None = None, reverse: bool = False
) -> list[dict[str, Any]]:
    """Sort by a column, numbers by size and names by letters; rows without a value come last in either direction.

    Raises ValueError that lists the columns where there is none of that name.
    """
    names = {name.removeprefix(PREFIX): name for name in columns} | {name: name for name in columns}
    if by is not None and by not in names:
        shown = ", ".join(name.removeprefix(PREFIX) for name in columns)
        raise ValueError(f"--sort {by} is no column; there are {shown}")
    keys = [names[by]] if by is not None else shown_columns(["data", "network", "lambda", "ratio", "seed", "run"], rows)
    ordered = list(rows)
    for key in reversed(keys):  # sorting is stable: the last key sorts first
        have = [row for row in ordered if row[key] is not None]
        have.sort(key=lambda row: row[key], reverse=reverse)
        ordered = [*have, *(row for row in ordered if row[key] is None)]
    return ordered


def shown_columns(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of a table for people: data set and network only where there are several."""
    return [
        name for name in columns if name not in ("data", "network") or len({row[name] for row in rows} - {None}) > 1
    ]


def _text(
    form: Format, found: Gathered, verdicts: Sequence[Verdict], columns: Sequence[str], rows: Sequence[dict[str, Any]]
) -> str:
    if form == "csv":
        return csv_text(columns, rows).rstrip("\n")
    said = notes(found, verdicts)
    if form == "json":
        return json.dumps({"rows": rows, "choices": [_choice(each) for each in verdicts], "notes": said}, indent=2)
    shown = shown_columns(columns, rows)
    lines = [[name.removeprefix(PREFIX) for name in shown]]
    lines += [[cell(name, row[name]) for name in shown] for row in rows]
    is_plain = form == "table"
    table = aligned(lines, _TEXTS) if is_plain else markdown(lines, _TEXTS)
    paragraphs = [each if is_plain else escaped(each) for each in said]
    chosen = [_paragraph(verdict, len(verdicts) > 1, is_plain) for verdict in verdicts]
    return "\n\n".join([*paragraphs, table, *chosen]) + "\n" * is_plain


def _paragraph(verdict: Verdict, is_named: bool, is_plain: bool) -> str:
    """The choice for one data set and network, and the command that exports it."""
    about = f"{verdict.task.network} on {verdict.task.data}: " * is_named
    if is_plain:
        return f"{cell('', about + verdict.sentence)}\n{verdict.command}".rstrip()
    command = f"\n\n    {verdict.command}" if verdict.command else ""
    return escaped(cell("", about + verdict.sentence)) + command


def _choice(verdict: Verdict) -> dict[str, Any]:
    baseline, chosen = verdict.baseline, verdict.chosen
    return {
        "data": verdict.task.data,
        "network": verdict.task.network,
        "baseline": None if baseline is None else {"accuracy": baseline.accuracy, "text": str(baseline)},
        "within": verdict.within,
        "smallest_by": verdict.by,
        "run": None if chosen is None else chosen.typical.run,
        "path": None if chosen is None else str(chosen.typical.path),
        "ratio": None if chosen is None else chosen.ratio,
        "accuracy": None if chosen is None else chosen.accuracy,
        "runs": [] if chosen is None else [entry.run for entry in chosen.entries],
        "text": verdict.sentence,
        "command": verdict.command or None,
    }


def _write_page(
    out: Path,
    config: CompareConfig,
    found: Gathered,
    verdicts: Sequence[Verdict],
    rows: Sequence[dict[str, Any]],
) -> list[str]:
    from netslim.launch.compare.page import write_page  # here: it imports matplotlib

    return write_page(
        out, found, verdicts, rows, shown_columns(columns_of(found.entries), rows), has_files=config.figures
    )


def _save_workspace(found: Gathered, paths: Sequence[Path]) -> str:
    from netslim.launch.compare.workspace import MOST_RUNS, save_workspace  # here: it imports W&B

    homes = {(config.record.project, config.record.entity) for _, config in found.configs}
    if len(homes) != 1:
        raise ValueError(
            f"--wandb needs runs of one W&B project, these are of {len(homes)}"
            f"{': ' * bool(homes)}{', '.join(sorted(project for project, _ in homes))}; compare those of one"
        )
    ((project, entity),) = homes
    groups = list(dict.fromkeys(config.record.group or name for name, config in found.configs))
    names = [path.resolve().name for path in paths]
    more = f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES)
    num_stages = len(found.sparse) + sum(len(entry.accuracy.keys() - {"sparse"}) for entry in found.entries)
    if num_stages > MOST_RUNS:
        warn(f"of {num_stages} stages the panels of the workspace show {MOST_RUNS}, unless its settings say more")
    return save_workspace(project, entity, groups, f"netslim {', '.join(names[:_MOST_NAMES])}{more}")
