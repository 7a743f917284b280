"""Which of the compared networks to take: the baseline, the candidates, the Pareto front; all of it pure."""

import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from netslim.launch.compare.entries import Entry, Gathered, Sparse, Task
from netslim.launch.config import differences, to_dict
from netslim.launch.tables import printable

Size = Literal["params", "macs", "file_mb"]
_ROUNDING = 1e-9  # of a difference of two accuracies
_MOST_DIFFERENCES = 6


@dataclass(frozen=True)
class Baseline:
    """The networks that were not slimmed, against which the others count: equal but for their seeds."""

    models: tuple[Sparse, ...]
    is_unpenalised: bool

    @cached_property
    def accuracy(self) -> float:
        """The mean over seeds; copies of one sparse model count once."""
        by_seed = defaultdict(list)
        for model in self.models:
            by_seed[model.seed].append(model.accuracy or 0.0)
        return fmean(map(fmean, by_seed.values()))

    def size(self, by: Size) -> float | None:
        return _mean([getattr(model, by) for model in self.models])

    def __str__(self) -> str:
        count = len({model.seed for model in self.models})
        which = "not slimmed" if self.is_unpenalised else "not slimmed, the best sparse model, as no run has lambda 0"
        seeds = f", mean of {count} seeds" if count > 1 else ""
        return f"{percent(self.accuracy)}, lambda {self.models[0].weight:g}, {which}{seeds}"


@dataclass(frozen=True)
class Candidate:
    """The fine-tuned networks of one recipe and ratio, which differ in nothing but their seeds."""

    entries: tuple[Entry, ...]

    @cached_property
    def accuracies(self) -> list[float]:
        return [entry.finetuned for entry in self.entries if entry.finetuned is not None]

    @cached_property
    def accuracy(self) -> float:
        return fmean(self.accuracies)

    @property
    def weight(self) -> float | None:
        return self.entries[0].weight

    @property
    def ratio(self) -> float | None:
        return self.entries[0].ratio

    @cached_property
    def typical(self) -> Entry:
        """The entry whose accuracy is nearest to the mean; the best would be chosen by the images it is tested on."""
        return min(self.entries, key=lambda entry: (abs((entry.finetuned or 0.0) - self.accuracy), entry.run))

    def size(self, by: Size) -> float | None:
        return _mean([getattr(entry, by) for entry in self.entries])

    def spread(self) -> str:
        """Of how many seeds, and how far they differ; nothing where there is one."""
        count = len(self.entries)
        if count == 1:
            return ""
        return f"mean of {count} seeds, {100 * min(self.accuracies):.2f} to {percent(max(self.accuracies))}"


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one data set and network."""

    task: Task
    baseline: Baseline | None
    candidates: tuple[Candidate, ...]
    within: float
    by: Size
    chosen: Candidate | None = None
    nearest: Candidate | None = None
    """The most accurate, where none is chosen."""
    best: Candidate | None = None
    """The most accurate, where the baseline lies below it and so says nothing of what may be lost."""

    @property
    def named(self) -> Candidate | None:
        return self.chosen or self.nearest

    @property
    def reference(self) -> float | None:
        """The accuracy of which no more than ``within`` may be lost."""
        if self.best is not None:
            return self.best.accuracy
        return None if self.baseline is None else self.baseline.accuracy

    @property
    def rule(self) -> str:
        """Say what is looked for, and of what accuracy little may be lost."""
        points = f"{100 * self.within:g} point{'s' * (round(100 * self.within, 9) != 1)}"
        of = f"the baseline ({self.baseline})"
        if self.best is not None:
            of = f"the best one ({percent(self.best.accuracy)}; {of} lies below it)"
        return f"smallest fine-tuned network (by {self.by}) within {points} of {of}"

    @property
    def sentence(self) -> str:
        """Say the rule, and what it finds."""
        if self.baseline is None:
            return "There is no baseline yet: no run has finished its sparsity training, so nothing is chosen."
        if self.chosen is not None:
            return f"The {self.rule}: {self.describe(self.chosen)}."
        if self.nearest is not None:
            return f"None is the {self.rule}: all lose more. The nearest: {self.describe(self.nearest)}."
        return f"No network is fine-tuned yet, so there is no {self.rule}."

    def describe(self, candidate: Candidate) -> str:
        """A candidate in words: its run, its accuracy, and what it saves."""
        spread = candidate.spread()
        parts = [
            f"{printable(candidate.typical.run)} at ratio {candidate.ratio:g}, lambda {candidate.weight:g}",
            f"{percent(candidate.accuracy)}{f' ({spread})' if spread else ''}",
        ]
        parts += [f"{size:,.0f} {by}{self.saving(candidate, by)}" for by, size in _counts(candidate)]
        return ", ".join(parts)

    def saving(self, candidate: Candidate, by: Size) -> str:
        """How many times smaller than the baseline; nothing where one is not measured."""
        before = None if self.baseline is None else self.baseline.size(by)
        after = candidate.size(by)
        return f" ({before / after:.1f} times smaller)" if before and after else ""

    @property
    def command(self) -> str:
        """What exports the network that the sentence names; nothing where it names none."""
        if self.named is None:
            return ""
        entry = self.named.typical
        return f"netslim export {shlex.quote(printable(str(entry.path)))} --ratio {entry.ratio} --format onnx"

    def change(self, entry: Entry) -> float | None:
        """Accuracy gained or lost against the baseline, in points; None where either is not measured."""
        if self.baseline is None or entry.finetuned is None:
            return None
        return 100 * (entry.finetuned - self.baseline.accuracy)


def judge(found: Gathered, within: float, by: Size) -> list[Verdict]:
    """One verdict for each data set and network."""
    known = {*(sparse.task for sparse in found.sparse), *(entry.task for entry in found.entries)}
    tasks = sorted(task for task in known if task is not None)
    return [_judge_task(task, found, within, by) for task in tasks]


def _judge_task(task: Task, found: Gathered, within: float, by: Size) -> Verdict:
    baseline = find_baseline([sparse for sparse in found.sparse if sparse.task == task])
    candidates = find_candidates([entry for entry in found.entries if entry.task == task])
    verdict = Verdict(task, baseline, tuple(candidates), within, by)
    sized = [candidate for candidate in candidates if candidate.size(by) is not None]
    if baseline is None or not sized:
        return verdict
    nearest = max(sized, key=lambda each: (each.accuracy, -(each.size(by) or 0)))
    # seeds and fine-tuning lift a network a little above what was trained without a penalty: that may stay the measure
    margin = within if baseline.is_unpenalised else 0.0
    best = nearest if nearest.accuracy > baseline.accuracy + margin + _ROUNDING else None
    least = (best or baseline).accuracy - within - _ROUNDING
    good = [each for each in sized if each.accuracy >= least]
    chosen = min(good, key=lambda each: (each.size(by) or 0, -each.accuracy, each.typical.run), default=None)
    return Verdict(task, baseline, tuple(candidates), within, by, chosen, None if chosen else nearest, best)


def find_baseline(models: Sequence[Sparse]) -> Baseline | None:
    """The models trained without a penalty, else the best; None where no accuracy is measured."""
    measured = [model for model in models if model.accuracy is not None]
    if not measured:
        return None
    free = tuple(model for model in measured if model.weight == 0)
    best = max(measured, key=lambda model: model.accuracy or 0.0)
    return Baseline(free or (best,), is_unpenalised=bool(free))


def find_candidates(entries: Sequence[Entry]) -> list[Candidate]:
    """The fine-tuned entries, those together that differ in the seed alone; by lambda and ratio."""
    together = defaultdict(list)
    for entry in entries:
        if entry.finetuned is not None:
            together[(entry.weight or 0.0, entry.ratio or 0.0, entry.recipe)].append(entry)
    return [Candidate(tuple(together[key])) for key in sorted(together)]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (size, accuracy) that no other matches in one and beats in the other, from small to large."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def notes(found: Gathered, verdicts: Sequence[Verdict]) -> list[str]:
    """What a reader has to know before he compares: different data sets and networks, and what else differs."""
    lines = []
    sets, networks = (_distinct(verdicts, key) for key in (lambda task: task.data, lambda task: task.network))
    if len(sets) > 1:
        lines.append(
            f"These runs are of {len(sets)} different data sets ({'; '.join(sets)}): accuracies of different data "
            "sets cannot be compared. Each has its own baseline and choice."
        )
    if len(networks) > 1:
        lines.append(
            f"These runs are of {len(networks)} different networks ({'; '.join(networks)}): each has its own baseline "
            "and choice."
        )
    other = _other_differences(found)
    if other:
        more = f", and {len(other) - _MOST_DIFFERENCES} more" * (len(other) > _MOST_DIFFERENCES)
        lines.append(f"The runs also differ in {', '.join(other[:_MOST_DIFFERENCES])}{more}.")
    unknown = [each for verdict in verdicts for each in verdict.candidates if each.size(verdict.by) is None]
    if unknown:
        lines.append(f"{len(unknown)} of the networks cannot be chosen: their {verdicts[0].by} was not measured.")
    return lines


def _distinct(verdicts: Sequence[Verdict], key: Callable[[Task], str]) -> list[str]:
    return [printable(name) for name in dict.fromkeys(key(verdict.task) for verdict in verdicts)]


def _other_differences(found: Gathered) -> list[str]:
    """Names of the fields, besides lambda, seed, data set and network, in which the configurations differ."""
    known = ("sparsity.weight", "seed", "data.source", "data.root", "data.size", "model.name", "model.width")
    dumped = [to_dict(config) for _, config in found.configs]
    lines = [line for each in dumped[1:] for line in differences(dumped[0], each)]
    return sorted({line.split(" was ")[0] for line in lines} - {*known})


def percent(accuracy: float) -> str:
    """A share as prose has it."""
    return f"{100 * accuracy:.2f} %"


def _counts(candidate: Candidate) -> list[tuple[Size, float]]:
    sizes: tuple[Size, ...] = ("params", "macs")
    return [(by, size) for by in sizes if (size := candidate.size(by)) is not None]


def _mean(values: Sequence[Any]) -> float | None:
    return fmean(values) if values and None not in values else None
