"""The figures of a comparison: accuracy against size, epochs, densities of |gamma|, channels kept."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from netslim.launch.choice import Candidate, Verdict, pareto, percent
from netslim.launch.curves import Curve, Cut, Drawn
from netslim.launch.entries import Entry
from netslim.launch.report import printable

INK, MUTED, LINE, PAPER, BAR = "#1b2027", "#5b6572", "#d8dce1", "#fdfdfc", "#c3cad3"
SERIES = ("#55606e", "#0072b2", "#d55e00", "#00855f", "#a64d8f", "#97700b", "#2f8fc4", "#8a3b1e")
"""Of the lambdas in their order, told apart also by the colour-blind (after Okabe and Ito), and by markers too."""
MARKERS = ("o", "s", "^", "D", "v")
_SIZE = (5.0, 3.6)  # inches of 72 units: as wide as a phone shows it at its text's own size
_RC: Any = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "path.simplify": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "netslim",
    "savefig.facecolor": "none",
}
_BINS = 60
_MOST_CUTS = 9
_WIDE = 0.15  # of a spread of accuracies that a straight axis would not resolve near its top
_TICKS = (10, 50, 70, 80, 90, 95, 98, 99, 100)


Mark = tuple[float, float, str]


@dataclass
class Chart:
    """A figure, and the values that a reader can ask for: where they are drawn, and what they say."""

    name: str
    title: str
    note: str
    figure: Figure
    axes: Axes
    marks: list[tuple[str, list[Mark]]] = field(default_factory=list)
    """A series' label, and its points: x and y as the axes have them, and the text."""

    def settle(self) -> None:
        """Fix where everything is, so that `points` and `svg` agree."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def points(self) -> list[tuple[str, list[Mark]]]:
        """The marks in the units of the SVG, from its upper left corner."""
        return [(label, [self._place(mark) for mark in marks]) for label, marks in self.marks]

    def _place(self, mark: Mark) -> Mark:
        x, y = self.axes.transData.transform(mark[:2])
        return round(float(x), 1), round(float(self.figure.bbox.height - y), 1), mark[2]

    def svg(self) -> str:
        """The figure as SVG: text as text, and the same bytes each time."""
        file = io.StringIO()
        with matplotlib.rc_context(_RC):
            self.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Type": None})
        return file.getvalue()

    def save(self, directory: Path, weights: Sequence[float]) -> None:
        """Write the figure to stand alone, with its title and legend: NAME.svg and NAME.png."""
        with matplotlib.rc_context(_RC):
            self.figure.set_layout_engine("constrained")
            self.axes.set_title(self.title, fontsize=11)
            for index, weight in enumerate(weights):
                marker, label = MARKERS[index % len(MARKERS)], f"lambda {weight:g}"
                self.axes.plot([], [], color=color_of(index), marker=marker, linestyle="none", label=label)
            self.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
            for name, metadata in ((f"{self.name}.svg", {"Date": None}), (f"{self.name}.png", {})):
                self.figure.savefig(directory / name, dpi=150, facecolor="white", metadata=metadata)


def color_of(index: int) -> str:
    return SERIES[index % len(SERIES)]


def draw_charts(drawn: Drawn, weights: Sequence[float], prefix: str) -> list[Chart]:
    """All figures of one data set and network; ``weights`` are the lambdas of the whole page, in their order."""
    with matplotlib.rc_context(_RC):
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
        figure = Figure(figsize=_SIZE, dpi=72, layout="constrained")
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
            scale_sizes(axes)
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
        axes.set_yscale("log")
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
        self.draw_thresholds(chart)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
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


def stretch_accuracy(axes: Axes, low: float, high: float) -> None:
    """Stretch an axis of accuracies in percent towards 100, where the best would lie together on a straight one."""
    if high - low < 100 * _WIDE:
        axes.margins(y=0.12)
        return

    def forward(value: np.ndarray) -> np.ndarray:
        return -np.log10(np.maximum(101.5 - np.asarray(value), 1e-3))

    axes.set_yscale("function", functions=(forward, lambda value: 101.5 - 10 ** -np.asarray(value)))
    axes.set_ylim(max(0.0, low - 4), 100.3)
    axes.set_yticks([tick for tick in _TICKS if tick >= low - 4])
    axes.yaxis.set_minor_locator(NullLocator())


def scale_sizes(axes: Axes) -> None:
    """Make x logarithmic, with ticks that are labelled however narrow it is."""
    axes.set_xscale("log")
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    decades = float(np.log10(high / low))
    steps = (1.0, 2.0, 5.0) if decades < 1.3 else (1.0, 3.0) if decades < 2.6 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A count as axes show it: 300k, 1M."""
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
