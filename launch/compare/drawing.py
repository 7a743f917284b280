"""The figures of a comparison: accuracy against size, epochs, densities of |gamma|, channels kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from netslim.launch.compare.charts import (
    BAR,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SIZE,
    STYLE,
    Chart,
    color_of,
    scale_log,
    stretch_accuracy,
)
from netslim.launch.compare.choice import Candidate, Verdict, pareto, percent
from netslim.launch.compare.curves import Curve, Cut, Drawn
from netslim.launch.compare.entries import Entry
from netslim.launch.tables import printable

_BINS = 60
_MOST_CUTS = 9


def draw_charts(drawn: Drawn, weights: Sequence[float], prefix: str) -> list[Chart]:
    """All figures of one data set and network; ``weights`` are the lambdas of the whole page, in their order."""
    with matplotlib.rc_context(STYLE):
        pen = _Pen(drawn, {weight: index for index, weight in enumerate(weights)}, prefix)
        charts = [*pen.accuracies(), *pen.epochs(), *pen.densities(), *pen.layers()]
        for chart in charts:
            chart.settle()
        return charts


class _Pen:
    def __init__(self, drawn: Drawn, order: dict[float, int], prefix: str) -> None:
        self.drawn = drawn
        self.verdict: Verdict = drawn.verdict
        self.order = order
        self.prefix = prefix

    def chart(self, name: str, title: str, note: str) -> Chart:
        figure = Figure(figsize=SIZE, dpi=72, layout="constrained")
        axes = figure.subplots()
        axes.grid(True)
        return Chart(f"{self.prefix}{name}", title, note, figure, axes)

    def color(self, weight: float | None) -> str:
        return color_of(self.order[weight or 0.0])

    def marker(self, weight: float | None) -> str:
        return MARKERS[self.order[weight or 0.0] % len(MARKERS)]

    def accuracies(self) -> list[Chart]:
        kinds: list[tuple[str, str, Callable[[Entry], float | None]]] = [
            ("params", "parameters", lambda entry: entry.params),
            ("macs", "multiply-accumulates", lambda entry: entry.macs),
            ("ratio", "ratio removed", lambda entry: entry.ratio),
        ]
        return [chart for kind in kinds for chart in self.accuracy(*kind)]

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
        xs, ys = zip(*sorted((candidates[i][1], 100 * candidates[i][0].accuracy) for i in front), strict=True)
        axes.plot(xs, ys, color=MUTED, linewidth=1.1, zorder=2, drawstyle=f"steps-{'pre' if sign < 0 else 'post'}")
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

    def scale_accuracy(self, chart: Chart, accuracies: Sequence[float]) -> None:
        """Draw the baseline and what may be lost, and scale the axis of accuracies: stretched where it must be."""
        axes, baseline = chart.axes, self.verdict.baseline
        values = [100 * value for value in accuracies]
        if baseline is not None:
            values.append(100 * baseline.accuracy)
            axes.axhline(values[-1], color=INK, linestyle=(0, (5, 3)), linewidth=1, zorder=1)
            axes.axhspan(values[-1] - 100 * self.verdict.within, values[-1], color=BAR, alpha=0.35, linewidth=0)
        stretch_accuracy(axes, min(values), max(values))
        axes.set_ylabel("accuracy, %")

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
                chart.axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
                chart.axes.set_xlabel("epoch")
                self.scale_accuracy(chart, [value for curve in curves for value in curve.accuracies])
                charts.append(chart)
        return charts

    def draw_curve(self, chart: Chart, curve: Curve, faint: float) -> None:
        source, is_chosen = curve.source, self.drawn.is_chosen(curve.source)
        accuracies = [100 * value for value in curve.accuracies]
        chart.axes.plot(
            curve.epochs,
            accuracies,
            color=self.color(source.weight),
            marker="" if len(accuracies) > 1 else self.marker(source.weight),
            linewidth=2.4 if is_chosen else 1.3,
            alpha=1 if is_chosen else faint,
            zorder=4 if is_chosen else 3,
        )
        ratio = f", ratio {source.ratio:g}" if isinstance(source, Entry) else ""
        about = f"lambda {source.weight:g}{ratio}, seed {source.seed}"
        points = [
            (float(epoch), 100 * value, f"epoch {epoch}: {percent(value)}\n{about}")
            for epoch, value in zip(curve.epochs, curve.accuracies, strict=True)
        ]
        chart.marks.append((printable(source.run), points))

    def densities(self) -> list[Chart]:
        """Where |gamma| lies after sparsity training, by lambda, and where the cuts fell."""
        gammas = self.drawn.gammas
        if not gammas:
            return []
        chart = self.chart("gammas", "Densities of |gamma|", "all BatchNorms of the sparse models; triangles: cuts")
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
        self.draw_thresholds(chart)
        axes.set(xlabel="|gamma|", ylabel="share of gammas, % (log scale)", xlim=(0, edges[-1]))
        return [chart]

    def draw_thresholds(self, chart: Chart) -> None:
        low = chart.axes.get_ylim()[0] / 1.3  # a strip of their own, below all that is measured
        for entry, threshold in self.drawn.thresholds:
            is_chosen, color = self.drawn.is_chosen(entry), self.color(entry.weight)
            chart.axes.plot([threshold], [low], "^", markersize=7, color=color, markeredgecolor=PAPER, zorder=4)
            if is_chosen:
                chart.axes.axvline(threshold, color=color, linestyle=":", linewidth=1.2)
            text = f"|gamma| <= {threshold:.4g} goes\nratio {entry.ratio:g}, lambda {entry.weight:g}"
            chart.marks.append((f"threshold of {printable(entry.run)}", [(threshold, low, text)]))
        chart.axes.set_ylim(bottom=low / 1.3)

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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))
        axes.grid(False, axis="x")
        axes.set(xlabel="BatchNorm, in the order of execution", ylabel="channels")
        for place, (name, before, after) in zip(places, cut.layers, strict=True):
            chart.marks.append((printable(name), [(float(place), float(after), f"{after} of {before} channels stay")]))
        return chart
