"""The figures of a comparison: accuracy against size, epochs, densities of |gamma|, channels kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from netslim.launch.compare.charts import (
    BAR,
    INK,
    MUTED,
    PAPER,
    STYLE,
    Chart,
    scale_log,
)
from netslim.launch.compare.choice import Candidate, pareto, percent
from netslim.launch.compare.curves import Curve, Cut, Drawn
from netslim.launch.compare.entries import Entry
from netslim.launch.compare.pen import Pen
from netslim.launch.run import StageName
from netslim.launch.tables import printable

_BINS = 60
_MOST_CUTS = 9
_MOST_NAMES = 24
"""Layers that are named on an axis."""
_LONGEST_NAME = 16
_MOST_RATIOS = 12
"""As many as can be written side by side along an axis."""
_STAGES: dict[StageName, str] = {"sparse": "sparse", "cut": "cut", "repaired": "repaired", "finetuned": "fine-tuned"}


def draw_charts(drawn: Drawn, weights: Sequence[float], prefix: str) -> list[Chart]:
    """All figures of one data set and network; ``weights`` are the lambdas of the whole page, in their order."""
    with matplotlib.rc_context(STYLE):
        pen = _Figures(drawn, {weight: index for index, weight in enumerate(weights)}, prefix)
        charts = [*pen.accuracies(), *pen.stages(), *pen.epochs(), *pen.densities(), *pen.layers()]
        for chart in charts:
            chart.settle()
        return charts


class _Figures(Pen):
    def accuracies(self) -> list[Chart]:
        kinds: list[tuple[str, str, Callable[[Entry], float | None]]] = [
            ("params", "parameters", lambda entry: entry.params),
            ("macs", "multiply-accumulates", lambda entry: entry.macs),
            ("ratio", "ratio removed", lambda entry: entry.ratio),
            ("latency", "ms for one image", self.latency),
        ]
        return [chart for kind in kinds for chart in self.accuracy(*kind)]

    def latency(self, entry: Entry) -> float | None:
        return next((latency for each, latency in self.drawn.latencies if each is entry), None)

    def accuracy(self, key: str, name: str, value: Callable[[Entry], float | None]) -> list[Chart]:
        """Fine-tuned accuracy against one size: single runs, their means, the front, the baseline, the choice."""
        candidates = [
            (candidate, sum(sizes) / len(sizes))
            for candidate in self.verdict.candidates
            if (sizes := [size for entry in candidate.entries if (size := value(entry)) is not None])
        ]
        if not candidates:
            return []
        chart = self.chart(key, f"Accuracy against {name}", "fine-tuned")
        axes = chart.axes
        for candidate, size in candidates:
            self.draw_candidate(chart, candidate, size, value)
        sign = -1 if key == "ratio" else 1
        front = pareto([(sign * size, candidate.accuracy) for candidate, size in candidates])
        for i, following in zip(front, [*front[1:], front[-1]], strict=True):  # what is had from here on
            ends = candidates[i][1], candidates[following][1]
            axes.hlines(100 * candidates[i][0].accuracy, min(ends), max(ends), color=MUTED, linewidth=1.1, zorder=2)
        self.draw_whole(chart, key)
        if key != "ratio":
            scale_log(axes, "x")
        axes.set(xlabel=f"{name}{'' if key == 'ratio' else ' (log scale)'}")
        self.scale_accuracy(chart, [accuracy for each, _ in candidates for accuracy in each.accuracies])
        return [chart]

    def draw_candidate(
        self, chart: Chart, candidate: Candidate, size: float, value: Callable[[Entry], float | None]
    ) -> None:
        axes, color, marker = chart.axes, self.color(candidate.weight), self.marker(candidate.weight)
        mean = 100 * candidate.accuracy
        about = f"lambda {candidate.weight:g}, ratio {candidate.ratio:g}"
        if len(candidate.entries) > 1:
            chart.marks.append((about, [(size, mean, f"{percent(candidate.accuracy)}\n{candidate.spread()}")]))
        for entry in candidate.entries:
            x, accuracy = value(entry), entry.finetuned
            if x is None or accuracy is None:
                continue
            if len(candidate.entries) > 1:
                axes.plot([x], [100 * accuracy], marker=marker, markersize=3.5, color=color, alpha=0.5, zorder=3)
            counts = [f"{count:,} {what}" for count, what in ((entry.params, "params"), (entry.macs, "MACs")) if count]
            text = "\n".join([percent(accuracy), ", ".join(counts), f"seed {entry.seed}, {about}"])
            chart.marks.append((printable(entry.run), [(x, 100 * accuracy, text)]))
        if candidate is self.verdict.chosen:
            axes.plot([size], [mean], "o", markersize=14, markerfacecolor="none", markeredgecolor=INK, zorder=5)
        axes.plot([size], [mean], marker=marker, markersize=7, color=color, markeredgecolor=PAPER, zorder=4)

    def draw_whole(self, chart: Chart, key: str) -> None:
        """Draw the network that was not slimmed, to see from where the others come."""
        baseline = self.verdict.baseline
        sizes = (
            {} if baseline is None else {"params": baseline.size("params"), "macs": baseline.size("macs"), "ratio": 0}
        )
        size = sizes.get(key)
        if baseline is not None and size is not None:
            y = 100 * baseline.accuracy
            chart.axes.plot([size], [y], "o", markersize=6, markerfacecolor=PAPER, markeredgecolor=INK, zorder=4)
            chart.marks.append(("not slimmed", [(size, y, str(baseline))]))

    def stages(self) -> list[Chart]:
        """What pruning costs and what repair and fine-tuning give back: a line for each network, stage by stage."""
        entries = [entry for candidate in self.verdict.candidates for entry in candidate.entries]
        known = [name for name in _STAGES if any(entry.accuracy.get(name) is not None for entry in entries)]
        if len(known) < 2:
            return []
        chart = self.chart("stages", "Accuracy, stage by stage", self.dashes_note())
        values: list[float] = []
        for entry in entries:
            found = [
                (place, value) for place, name in enumerate(known) if (value := entry.accuracy.get(name)) is not None
            ]
            values += [value for _, value in found]
            self.draw_line(chart, entry, found, faint=max(0.3, min(0.85, 12 / len(entries))), marker=True)
            about = f"ratio {entry.ratio:g}, lambda {entry.weight:g}, seed {entry.seed}"
            marks = [
                (float(place), 100 * value, f"{_STAGES[known[place]]}: {percent(value)}\n{about}")
                for place, value in found
            ]
            chart.marks.append((printable(entry.run), marks))
        chart.axes.set_xticks(range(len(known)), [_STAGES[name] for name in known])
        chart.axes.set_xlim(-0.25, len(known) - 0.75)
        self.scale_accuracy(chart, values)
        return [chart]

    def epochs(self) -> list[Chart]:
        drawn = self.drawn
        charts = []
        for name, title, curves in (
            ("sparsify", "Sparsity training", drawn.sparsify),
            ("finetune", "Fine-tuning", drawn.finetune),
        ):
            if curves:
                chart = self.chart(name, title, "accuracy after each epoch")
                for curve in curves:
                    self.draw_curve(chart, curve, faint=max(0.25, min(0.85, 12 / len(curves))))
                if name == "finetune" and len(self.ratios) > 1:
                    chart.note += f"; {self.dashes_note()}"
                chart.axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
                chart.axes.set_xlabel("epoch")
                self.scale_accuracy(chart, [value for curve in curves for value in curve.accuracies])
                charts.append(chart)
        return charts

    def draw_curve(self, chart: Chart, curve: Curve, faint: float) -> None:
        source = curve.source
        points = list(zip(curve.epochs, curve.accuracies, strict=True))
        self.draw_line(chart, source, points, faint=faint, marker=len(points) == 1)
        ratio = f", ratio {source.ratio:g}" if isinstance(source, Entry) else ""
        about = f"lambda {source.weight:g}{ratio}, seed {source.seed}"
        marks = [(float(epoch), 100 * value, f"epoch {epoch}: {percent(value)}\n{about}") for epoch, value in points]
        chart.marks.append((printable(source.run), marks))

    def densities(self) -> list[Chart]:
        """Where |gamma| lies after sparsity training, by lambda, and where the cuts fell."""
        gammas = self.drawn.gammas
        if not gammas:
            return []
        chart = self.chart(
            "gammas", "Densities of |gamma|", "all BatchNorms of the sparse models; triangles: cuts, with their ratio"
        )
        axes = chart.axes
        edges = np.linspace(0, max(float(values.max()) for values in gammas.values()) or 1.0, _BINS + 1)
        for weight, values in gammas.items():
            shares = 100 * np.histogram(values, bins=edges)[0] / len(values)
            axes.stairs(shares, edges, color=self.color(weight), linewidth=1.5)
            texts = [f"{share:.2f} % of {len(values):,}" for share in shares]
            points = [
                (float(low + high) / 2, float(share), f"|gamma| {low:.3f} to {high:.3f}: {text}")
                for low, high, share, text in zip(edges, edges[1:], shares, texts, strict=False)
                if share > 0
            ]
            chart.marks.append((f"lambda {weight:g}", points))
        scale_log(axes, "y")
        axes.set(xlabel="|gamma|", ylabel="share of gammas, % (log scale)", xlim=(0, edges[-1]))
        self.draw_thresholds(chart)
        return [chart]

    def draw_thresholds(self, chart: Chart) -> None:
        low = chart.axes.get_ylim()[0] / 1.3  # a strip of their own, below all that is measured
        for entry, threshold in self.drawn.thresholds:
            is_chosen, color = self.drawn.is_chosen(entry), self.color(entry.weight)
            # a threshold of 0 stands on the axis: not cut off there
            look: Any = {"markersize": 10, "color": color, "markeredgecolor": PAPER, "zorder": 4, "clip_on": False}
            chart.axes.plot([threshold], [low], "^", **look)
            if is_chosen:
                chart.axes.axvline(threshold, color=color, linestyle=":", linewidth=1.2)
            text = f"|gamma| <= {threshold:.4g} goes\nratio {entry.ratio:g}, lambda {entry.weight:g}"
            chart.marks.append((f"threshold of {printable(entry.run)}", [(threshold, low, text)]))
        thresholds = [(entry.ratio or 0.0, threshold) for entry, threshold in self.drawn.thresholds]
        for place, ratios in named_together(thresholds, near=chart.axes.get_xlim()[1] / _MOST_RATIOS):
            text = ", ".join(ratios) if len(ratios) <= 3 else f"{ratios[0]} to {ratios[-1]}"
            chart.axes.annotate(text, (place, low), (6, 3), textcoords="offset points", fontsize=9, zorder=5)
        chart.axes.set_ylim(bottom=low / 1.6)

    def layers(self) -> list[Chart]:
        """Channels kept, one chart a cut: the named network first, then its other ratios, then other lambdas."""
        typical = None if self.verdict.named is None else self.verdict.named.typical

        def rank(cut: Cut) -> tuple[bool, bool, float, float]:
            entry = cut.entry
            return entry is not typical, not self.is_kin(entry), entry.weight or 0.0, entry.ratio or 0.0

        cuts = [cut for cut in self.drawn.cuts if self.is_kin(cut.entry) or self.is_counterpart(cut.entry)]
        return [self.layer_chart(cut, number) for number, cut in enumerate(sorted(cuts, key=rank)[:_MOST_CUTS])]

    def is_kin(self, entry: Entry) -> bool:
        """Whether it was cut from the same sparse model as the named network; without one, any is."""
        named = self.verdict.named
        return named is None or (entry.recipe, entry.seed) == (named.typical.recipe, named.typical.seed)

    def is_counterpart(self, entry: Entry) -> bool:
        """Whether it was cut at the same ratio as the named network, with the same seed."""
        named = self.verdict.named
        return named is not None and (entry.ratio, entry.seed) == (named.ratio, named.typical.seed)

    def layer_chart(self, cut: Cut, number: int) -> Chart:
        entry, chosen = cut.entry, self.verdict.chosen
        is_chosen = chosen is not None and entry is chosen.typical
        note = f"seed {entry.seed}{', the choice' * is_chosen}"
        chart = self.chart(f"layers-{number + 1}", f"Ratio {entry.ratio:g}, lambda {entry.weight:g}", note)
        axes, places = chart.axes, range(1, len(cut.layers) + 1)
        width = 0.8 if len(cut.layers) < 60 else 1.0
        axes.bar(places, [before for _, before, _ in cut.layers], width=width, color=BAR)
        axes.bar(places, [after for _, _, after in cut.layers], width=width, color=self.color(entry.weight))
        step = -(-len(cut.layers) // _MOST_NAMES)  # of many layers every so manieth is named
        names = [_shortened(printable(name)) for name, _, _ in cut.layers[::step]]
        axes.set_xticks([*places][::step], names, rotation=90, fontsize=8)
        axes.grid(False, axis="x")
        axes.set(xlabel="BatchNorm, in the order of execution", ylabel="channels")
        for place, (name, before, after) in zip(places, cut.layers, strict=True):
            chart.marks.append((printable(name), [(float(place), float(after), f"{after} of {before} channels stay")]))
        return chart


def named_together(thresholds: Sequence[tuple[float, float]], near: float) -> list[tuple[float, list[str]]]:
    """Name ratios, (ratio, threshold) each, where the highest thresholds lie; with less than ``near`` each, as one."""
    found: list[tuple[float, list[str]]] = []
    highest = {ratio: max(place for each, place in thresholds if each == ratio) for ratio, _ in thresholds}
    for place, ratio in sorted((place, ratio) for ratio, place in highest.items()):
        together = found.pop()[1] if found and place - found[-1][0] < near * len(found[-1][1]) else []
        found.append((place, [*together, f"{ratio:g}"]))
    return found


def _shortened(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else f"\u2026{name[1 - _LONGEST_NAME :]}"
