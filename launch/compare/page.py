"""The page of a comparison: one HTML file that needs no network, for the screen, the phone and paper."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netslim.base import replace_all
from netslim.launch.compare.charts import MARKERS, MOST_IN_LEGEND, SERIES, Chart
from netslim.launch.compare.choice import Verdict, notes, percent
from netslim.launch.compare.curves import Drawn, read_drawn
from netslim.launch.compare.drawing import draw_charts
from netslim.launch.compare.entries import Gathered
from netslim.launch.compare.look import SCRIPT, STYLE, VARIABLES
from netslim.launch.tables import cell, printable

_TITLES = {
    "run": "run",
    "accuracy_sparse": "sparse",
    "accuracy_cut": "cut",
    "accuracy_repaired": "repaired",
    "accuracy_finetuned": "fine-tuned",
    "accuracy_finetuned_cut": "from the cut",
    "accuracy_scratch": "from scratch",
    "macs": "MACs",
    "file_mb": "file, MB",
}
_TEXTS = ("run", "data", "network", "state")
_GLYPHS = dict(zip(MARKERS, "●■▲◆▼", strict=True))
_GROUPS = (
    ("Accuracy and size", ("params", "macs", "ratio", "latency")),
    ("What the cut costs, and what comes back", ("stages",)),
    ("Training, and the scales it leaves", ("sparsify", "finetune", "gammas")),
    ("Channels kept, layer by layer", ("layers",)),
)
_EXPLAINED = {
    "Accuracy and size": "Each mark is a fine-tuned network, or the mean over its seeds with the single ones small. "
    "The steps are the Pareto front: no network has fewer of these and more accuracy. Dashed: the accuracy of "
    "which no more than the band may be lost. The ring is the choice; the hollow mark is the network before slimming.",
    "What the cut costs, and what comes back": "One line a network, from the sparse model on: cut, repaired without a "
    "training step, fine-tuned. The choice is thick.",
    "Training, and the scales it leaves": "One line a run; the choice is thick. A penalty that works leaves many "
    "gammas at zero, and a gap before the others. A triangle marks where a cut fell, with its ratio: of the gammas to "
    "its left only those were kept that a rule holds.",
    "Channels kept, layer by layer": "Grey: before the cut. Colour: what stays. First the choice, then the other cuts "
    "of its sparse model, then the same ratio at other lambdas.",
}


def write_page(
    out: Path,
    found: Gathered,
    verdicts: Sequence[Verdict],
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    *,
    has_files: bool = False,
) -> list[str]:
    """Write the page, whole or not at all; returns a line for each file whose figure is left out.

    With ``has_files`` each figure is also written to stand alone, into a directory beside the page.
    """
    known = [*(sparse.weight for sparse in found.sparse), *(entry.weight for entry in found.entries)]
    weights = sorted({weight for weight in known if weight is not None})
    drawn = [read_drawn(verdict, found) for verdict in verdicts]
    charts = [draw_charts(each, weights, f"f{number}-") for number, each in enumerate(drawn, 1)]
    troubles = [trouble for each in drawn for trouble in each.troubles]
    replace_all(out.parent, {out.name: make_page(found, drawn, charts, rows, columns, weights).encode()})
    if has_files:
        directory = out.with_name(f"{out.stem}-figures")
        directory.mkdir(exist_ok=True)
        for chart in (chart for group in charts for chart in group):
            chart.save(directory, weights)
    return troubles


def make_page(
    found: Gathered,
    drawn: Sequence[Drawn],
    charts: Sequence[Sequence[Chart]],
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    weights: Sequence[float],
) -> str:
    """The page as text; all that comes from the runs is escaped."""
    verdicts = [each.verdict for each in drawn]
    warnings = [*found.warnings, *(f"Left out of the figures: {line}" for each in drawn for line in each.troubles)]
    said = [*notes(found, verdicts), *warnings]
    networks = list(dict.fromkeys(f"{each.task.network} on {each.task.data}" for each in verdicts))
    title = f"Network slimming: {networks[0]}" if len(networks) == 1 else "Network slimming: runs compared"
    body = [
        f"<header><h1>{_text(title)}</h1>",
        f'<p class="lead">{_text(_count(rows))}</p></header>',
        f'<ul class="notes">{"".join(f"<li>{_text(line)}</li>" for line in said)}</ul>' * bool(said),
        *(_choice(verdict, is_named=len(verdicts) > 1) for verdict in verdicts),
        "<h2>Runs</h2>",
        '<p class="hint">Select a heading to sort by it. Change: points of fine-tuned accuracy against the baseline. '
        "Seconds: all stages together. An empty field was not measured.</p>",
        _table(rows, columns, weights),
        *(_figures(each, group, weights, is_named=len(drawn) > 1) for each, group in zip(drawn, charts, strict=True)),
    ]
    return _document(title, "\n".join(body))


def _document(title: str, body: str) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # no other script may run, and nothing be fetched
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
{body}
<div id="tip" role="status"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    return html.escape(printable(text))


def _count(rows: Sequence[dict[str, Any]]) -> str:
    """How many there are, and how many of them are done."""
    runs = len({row["run"] for row in rows})
    done = sum(row["state"] == "done" for row in rows)
    rest = "all done" if done == len(rows) else f"{done} done, {len(rows) - done} not"
    return f"{runs} run{'s' * (runs != 1)}, {len(rows)} networks: {rest}"


def _choice(verdict: Verdict, *, is_named: bool) -> str:
    named = verdict.named
    kind = "choice" if verdict.chosen is not None else "choice none"
    about = f"{verdict.task.network} on {verdict.task.data}: " * is_named
    if named is None:
        head = _text(f"{about}no choice yet")
        return f'<section class="{kind}"><h2>{head}</h2><p>{_text(verdict.sentence)}</p></section>'
    head = "the choice" if verdict.chosen is not None else "none is accurate enough; the nearest"
    head = f"{about}{head}" if is_named else head.capitalize()
    facts = [("accuracy", percent(named.accuracy), named.spread()), ("ratio", f"{named.ratio:g}", "")]
    facts += [("lambda", f"{named.weight:g}", "")]
    for by, name in (("params", "params"), ("macs", "MACs"), ("file_mb", "file, MB")):
        size = named.size(by)  # type: ignore[arg-type]
        if size is not None:
            saving = verdict.saving(named, by)  # type: ignore[arg-type]
            facts.append((name, f"{size:,.3f}" if by == "file_mb" else f"{size:,.0f}", saving.strip(" ()")))
    rule = f"The {verdict.rule}." if verdict.chosen is not None else f"Wanted was the {verdict.rule}; all lose more."
    items = "".join(
        f"<div><dt>{name}</dt><dd>{_text(value)}{f'<small>{_text(more)}</small>' * bool(more)}</dd></div>"
        for name, value, more in facts
    )
    return (
        f'<section class="{kind}"><h2>{_text(head)}</h2><p class="name">{_text(named.typical.run)}</p><dl>{items}</dl>'
        f"<p>{_text(rule)}</p><p>It is in <code>{_text(str(named.typical.path))}</code>; to export it:</p>"
        f"<pre>{_text(verdict.command)}</pre></section>"
    )


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], weights: Sequence[float]) -> str:
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_is_text(name)}><button type="button">'
        f"{_TITLES.get(name, name)}</button></th>"
        for name in columns
    )
    longest = max((len(row["run"]) for row in rows), default=0) + 2
    lines = "\n".join(_line(row, columns, weights) for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Runs">'
        f'<table style="--longest: {longest}ch">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def _is_text(name: str) -> str:
    return ' class="text"' * (name in _TEXTS)


def _line(row: dict[str, Any], columns: Sequence[str], weights: Sequence[float]) -> str:
    cells = []
    for name in columns:
        value = row[name]
        shown = "" if value is None else _text(cell(name, value))
        if name == "lambda" and value is not None:
            shown = _glyph(weights.index(value)) + shown
        data = "" if value is None else _text(str(value))
        if name == "run":
            # a narrow column breaks the name between its parts first
            parts = "".join(f"<span>{_text(part)}</span>" for part in re.findall("[^_/]*[_/]|[^_/]+", value))
            cells.append(f'<th scope="row" class="text" data-value="{data}">{parts}</th>')
        else:
            kind = _is_text(name)
            if name == "state":
                kind = f' class="text {"done" if value == "done" else "state-bad"}"'
            cells.append(f'<td{kind} data-value="{data}">{shown}</td>')
    return f"<tr{' class=pick' * row['chosen']}>{''.join(cells)}</tr>"


def _glyph(index: int) -> str:
    marker = _GLYPHS[MARKERS[index % len(MARKERS)]]
    return f'<span class="dot" style="color: var(--series-{index % len(SERIES)})" aria-hidden="true">{marker}</span>'


def _figures(drawn: Drawn, charts: Sequence[Chart], weights: Sequence[float], *, is_named: bool) -> str:
    """The figures of one data set and network, under headings of their own."""
    task = drawn.verdict.task
    parts = [f"<h2>{_text(f'{task.network} on {task.data}') if is_named else 'Figures'}</h2>"]
    shown = weights if len(weights) <= MOST_IN_LEGEND else []
    items = "".join(f"<li>{_glyph(index)}lambda {weight:g}</li>" for index, weight in enumerate(shown))
    parts.append(
        f'<ul class="legend">{items or "<li>colours: by lambda, as in the table</li>"}'
        "<li>Point at, tap, or step through a figure by its arrow keys for values.</li></ul>"
    )
    for heading, names in _GROUPS:
        own = [chart for chart in charts if chart.name.split("-", 1)[1].startswith(names)]
        if own:
            figures = "\n".join(_figure(chart) for chart in own)
            hint = _EXPLAINED[heading]
            if names == ("layers",) and len(own) < len(drawn.cuts):
                hint += f" {len(own)} of {len(drawn.cuts)} cuts are drawn."
            parts.append(f'<h3>{heading}</h3><p class="hint">{hint}</p><div class="figures">{figures}</div>')
    return "\n".join(parts)


def _figure(chart: Chart) -> str:
    # "<" spelt out: no label can end the element that it stands in
    points = json.dumps(chart.points(), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure id="{chart.name}"><figcaption>{_text(chart.title)} <span>{_text(chart.note)}</span></figcaption>'
        f'{inline(chart)}<script type="application/json">{points}</script></figure>'
    )


def inline(chart: Chart) -> str:
    """The chart's SVG as part of the page: its ids its own, its colours and fonts the page's."""
    text = chart.svg()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'\bid="', f'id="{chart.name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{chart.name}-", text)
    text = re.sub("#[0-9a-f]{6}", lambda match: VARIABLES.get(match[0], match[0]), text)
    text = re.sub(r"<text style=\"(?![^\"]*fill)", '<text style="fill: var(--ink); ', text)
    head = f'<svg tabindex="0" role="img" aria-label="{_text(chart.title)}, {_text(chart.note)}" '
    return re.sub(r'<svg (.*?) width="[^"]*" height="[^"]*"', rf"{head}\1", text, count=1).strip()
