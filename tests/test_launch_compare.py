"""`netslim compare`: what it says of runs is what their directories say, and the choice follows its rule."""

import csv
import functools
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from netslim.data import DataConfig, DataInfo
from netslim.launch.compare.choice import Candidate, Verdict, find_baseline, find_candidates, judge, notes, pareto
from netslim.launch.compare.command import compare_runs, sort_rows
from netslim.launch.compare.entries import Entry, Gathered, Sparse, Task, gather
from netslim.launch.config import PruneConfig, RunConfig
from netslim.launch.mistakes import guarded
from netslim.launch.run.directory import claim, write_json, write_stage
from netslim.launch.run.results import write_results
from netslim.launch.sweep.grid import Member, Sweep
from netslim.prune import Origin, Plan, slim
from netslim.train import ModelConfig, RecordConfig, SparsityConfig, build_model

Run = Callable[..., Path]
Compare = Callable[..., tuple[int, str, str]]
MODEL = ModelConfig(name="vgg11", width=0.0625)
ORIGIN = Origin(function="tests.nets:build", num_classes=10)
IMAGES = DataInfo(None, "torch", tuple("0123456789"), 1, 1, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 16)
SMALL = RunConfig(data=DataConfig(size=16), model=MODEL)
# no path can hold a slash, and its last character is none of any encoding
HOSTILE = "=1+1 \"quoted\" 'too' | <script>alert(1)<script> $(touch x) `x`\nsecond line \udcff"


@functools.cache
def networks(ratio: float) -> tuple[nn.Module, nn.Module, Plan]:
    """A small network, the same cut, and the plan."""
    model = build_model(MODEL, num_classes=10, seed=0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(0)
    for norm in norms:
        norm.weight.data = torch.rand(norm.num_features, generator=generator)
    return model, *slim(model, torch.zeros(1, 3, 16, 16), ratio=ratio)


@pytest.fixture
def make_run(tmp_path: Path) -> Run:
    """Writes a run's directory as stages write it, with these accuracies; gives its path."""

    def make(
        name: str,
        *,
        weight: float = 0.0,
        seed: int = 0,
        sparse: float | None = 0.95,
        finetuned: dict[float, float | None] | None = None,
        base: RunConfig | None = None,
        parent: Path = tmp_path,
    ) -> Path:
        finetuned = {0.5: 0.9} if finetuned is None else finetuned
        directory = parent / name
        config = replace(
            base or SMALL,
            model=MODEL,
            sparsity=SparsityConfig(weight=weight),
            prune=PruneConfig(ratio=tuple(finetuned) or (0.5,)),
            seed=seed,
        )
        claim(directory, "digits", config)
        write(directory / "sparse", networks(0.5)[0], None, config, ("sparse", 0.0, sparse), 4000)
        for ratio, accuracy in finetuned.items():
            _, small, plan = networks(ratio)
            size = round(4000 * (1 - ratio))  # three digits or four: not sorted as text
            for stage, kind, value in (("prune", "cut", 0.1), ("repair", "repaired", 0.5)):
                write(stage_of(directory, stage, ratio), small, plan, config, (kind, ratio, value), size)
            if accuracy is not None:
                write(stage_of(directory, "finetune", ratio), small, plan, config, ("finetuned", ratio, accuracy), size)
        write_results(directory, preset="digits")
        return directory

    return make


def stage_of(directory: Path, stage: str, ratio: float) -> Path:
    return directory / f"{stage}-{ratio:.2f}"


def write(
    directory: Path,
    model: nn.Module,
    plan: Plan | None,
    config: RunConfig,
    row: tuple[str, float, float | None],
    size: int,
) -> None:
    stage, ratio, accuracy = row
    metrics = {"stage": stage, "ratio": ratio, "accuracy": accuracy, "params": size, "macs": 10 * size, "seconds": 1.5}
    metrics["latency_ms_1"] = size / 1000
    if plan is not None and stage == "cut":
        metrics["threshold"] = plan.threshold
    write_stage(directory, model, plan, ORIGIN, IMAGES, config, metrics)
    if stage in ("sparse", "finetuned") and accuracy is not None:
        lines = [json.dumps({"epoch": epoch, "accuracy": accuracy * epoch / 2}) for epoch in (1, 2)]
        (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def compare(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Runs the command in an empty directory; gives the exit code, stdout and stderr."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = guarded(lambda: compare_runs([str(argument) for argument in arguments]))
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the page, which takes longest."""
    monkeypatch.setattr("netslim.launch.compare.command._write_page", lambda *_: [])


def rows_of(compare: Compare, *arguments: object) -> list[dict[str, Any]]:
    code, printed, _ = compare(*arguments, "--format", "json")
    assert code == 0
    rows: list[dict[str, Any]] = json.loads(printed)["rows"]
    return rows


TASK = Task("digits, 16x16", "vgg11")


def entry(run: str = "a", *, ratio: float = 0.5, accuracy: float | None = 0.9, params: int = 100, **more: Any) -> Entry:
    values = {"task": TASK, "weight": 0.0, "seed": 0, "recipe": "", "macs": 10 * params, "file_mb": 0.1, **more}
    return Entry(
        run=run, path=Path(run), state="done", ratio=ratio, accuracy={"finetuned": accuracy}, params=params, **values
    )


def sparse(accuracy: float, weight: float = 0.0, seed: int = 0, run: str = "a") -> Sparse:
    figures = {"params": 1000, "macs": 10000, "file_mb": 1.0}
    return Sparse(run=run, path=Path(run), task=TASK, weight=weight, seed=seed, accuracy=accuracy, **figures)


def decide(entries: Sequence[Entry], models: Sequence[Sparse], within: float = 0.01, by: Any = "params") -> Verdict:
    (verdict,) = judge(Gathered(list(entries), list(models), [], []), within, by)
    return verdict


def chosen(verdict: Verdict) -> Candidate:
    assert verdict.chosen is not None
    return verdict.chosen


def test_the_figures_of_a_row_are_those_of_results_json(make_run: Run, compare: Compare, without_page: None) -> None:
    run = make_run("one", weight=1e-3, seed=7, finetuned={0.5: 0.91, 0.8: 0.8})
    rows = rows_of(compare, run)
    stored = json.loads((run / "results.json").read_text())["rows"]
    for row, ratio in zip(rows, (0.5, 0.8), strict=True):
        own = {each["stage"]: each for each in stored if each["ratio"] in (0, ratio)}
        assert (row["run"], row["lambda"], row["seed"], row["ratio"]) == ("one", 1e-3, 7, ratio)
        for stage in ("sparse", "cut", "repaired", "finetuned"):
            assert row[f"accuracy_{stage}"] == own[stage]["accuracy"]
        assert all(row[key] == own["finetuned"][key] for key in ("params", "macs", "file_mb"))
        assert row["seconds"] == sum(each["seconds"] for each in own.values())
        assert row["state"] == "done"
    assert rows[0]["change"] == pytest.approx(100 * (0.91 - 0.95))
    assert "accuracy_scratch" not in rows[0]


def test_what_was_not_measured_is_null_and_empty_never_zero(
    make_run: Run, compare: Compare, without_page: None
) -> None:
    run = make_run("one", finetuned={0.5: None})
    (row,) = rows_of(compare, run)
    assert (row["accuracy_finetuned"], row["change"]) == (None, None)
    assert row["state"] == "incomplete: finetune missing"
    (line,) = csv.DictReader(io.StringIO(compare(run, "--format", "csv")[1]))
    assert (line["accuracy_finetuned"], line["change"], line["accuracy_cut"]) == ("", "", "0.1")


def test_the_pareto_front_holds_what_nothing_matches_and_beats() -> None:
    points = [(5.0, 0.9), (1.0, 0.5), (3.0, 0.9), (2.0, 0.4), (9.0, 0.95), (3.0, 0.8), (9.0, 0.95)]
    assert pareto(points) == [1, 2, 4]
    assert pareto([]) == []


def test_the_smallest_within_the_loss_is_chosen_also_where_one_is_exactly_at_the_limit() -> None:
    entries = [
        entry("large", ratio=0.3, accuracy=0.96, params=700),
        entry("limit", ratio=0.5, accuracy=0.94, params=500),
        entry("below", ratio=0.9, accuracy=0.9399, params=100),
    ]
    verdict = decide(entries, [sparse(0.95)])
    assert chosen(verdict).typical.run == "limit"
    assert "within 1 point of the baseline (95.00 %, lambda 0, not slimmed)" in verdict.sentence
    assert "500 params (2.0 times smaller)" in verdict.sentence
    assert verdict.command == "netslim export limit --ratio 0.5 --format onnx"
    # in floating point 0.54 - 0.05 is more than 0.49
    assert chosen(decide([entry(accuracy=0.49)], [sparse(0.54)], within=0.05)).accuracy == 0.49


def test_smallest_can_mean_macs_or_the_file() -> None:
    entries = [entry("few-params", ratio=0.3, params=10, macs=900), entry("few-macs", ratio=0.5, params=20, macs=100)]
    assert chosen(decide(entries, [sparse(0.9)])).typical.run == "few-params"
    assert chosen(decide(entries, [sparse(0.9)], by="macs")).typical.run == "few-macs"


def test_a_network_whose_size_was_not_measured_is_said_to_be_out_of_the_choice() -> None:
    found = Gathered([entry("known", ratio=0.3), entry("unknown", ratio=0.5, file_mb=None)], [sparse(0.9)], [], [])
    for by, lines in (
        ("params", []),
        ("file_mb", ["1 of the networks cannot be chosen: their file_mb was not measured."]),
    ):
        assert notes(found, judge(found, 0.01, by)) == lines  # type: ignore[arg-type]


def test_where_none_is_within_the_loss_the_nearest_is_named() -> None:
    entries = [entry("near", ratio=0.3, accuracy=0.8), entry("far", ratio=0.9, accuracy=0.3)]
    verdict = decide(entries, [sparse(0.95)])
    assert verdict.chosen is None
    assert verdict.sentence.startswith("None is the smallest fine-tuned network")
    assert "The nearest: near at ratio 0.3" in verdict.sentence


def test_a_baseline_below_the_best_network_is_no_measure_of_what_may_be_lost() -> None:
    entries = [
        entry("worst", ratio=0.9, accuracy=0.8282, params=100),
        entry("best", ratio=0.5, accuracy=0.9944, params=500),
    ]
    for baseline in (sparse(0.5099, weight=1e-3), sparse(0.5099)):
        verdict = decide(entries, [baseline])
        assert chosen(verdict).typical.run == "best"
        assert verdict.reference == 0.9944
        assert "within 1 point of the best one (99.44 %; the baseline (50.99 %" in verdict.sentence
        assert "lies below it)" in verdict.sentence
    # what was trained without a penalty stays the measure where it is no more than that below
    verdict = decide([entry("a", accuracy=0.955), entry("b", ratio=0.9, accuracy=0.942, params=1)], [sparse(0.95)])
    assert chosen(verdict).typical.run == "b"


def test_seeds_are_one_candidate_by_their_mean_and_a_typical_one_is_named() -> None:
    seeds = [entry(f"s{seed}", seed=seed, accuracy=value) for seed, value in enumerate((0.90, 0.94, 0.96))]
    verdict = decide([*seeds, entry("lucky", ratio=0.9, accuracy=0.92, params=50)], [sparse(0.94)])
    assert chosen(verdict).accuracy == pytest.approx(0.93333, abs=1e-4)
    assert chosen(verdict).typical.run == "s1"
    assert "93.33 % (mean of 3 seeds, 90.00 to 96.00 %)" in verdict.sentence


def test_runs_that_differ_in_more_than_the_seed_are_different_candidates() -> None:
    assert len(find_candidates([entry("a", recipe="gamma"), entry("b", recipe="reconstruction")])) == 2


def test_the_baseline_is_lambda_0_averaged_over_seeds_in_which_copies_count_once_else_the_best_sparse_model() -> None:
    free = [sparse(0.90, seed=0), sparse(0.90, seed=0, run="copy"), sparse(0.96, seed=1), sparse(0.99, weight=1e-4)]
    baseline = find_baseline(free)
    assert baseline is not None
    assert baseline.accuracy == pytest.approx(0.93)
    assert str(baseline) == "93.00 %, lambda 0, not slimmed, mean of 2 seeds"
    best = find_baseline([sparse(0.91, weight=1e-3), sparse(0.99, weight=1e-4)])
    assert str(best) == "99.00 %, lambda 0.0001, not slimmed, the best sparse model, as no run has lambda 0"
    assert find_baseline([]) is None


def test_rows_are_sorted_by_size_in_both_directions_and_those_without_a_value_stay_last() -> None:
    rows = [{"run": run, "params": params} for run, params in (("a", 9), ("b", None), ("c", 100), ("d", 20))]
    columns = ["run", "params"]
    assert [row["run"] for row in sort_rows(rows, columns, "params")] == ["a", "d", "c", "b"]
    assert [row["run"] for row in sort_rows(rows, columns, "params", reverse=True)] == ["c", "d", "a", "b"]
    with pytest.raises(ValueError, match="--sort size is no column; there are run, params"):
        sort_rows(rows, columns, "size")


def test_the_command_sorts_by_the_name_that_its_table_shows(
    make_run: Run, compare: Compare, without_page: None
) -> None:
    run = make_run("one", finetuned={0.3: 0.8, 0.5: 0.9, 0.8: 0.7})
    rows = rows_of(compare, run, "--sort", "finetuned", "--reverse")
    assert [row["accuracy_finetuned"] for row in rows] == [0.9, 0.8, 0.7]


def test_csv_json_and_markdown_say_the_same_and_nothing_else_goes_to_stdout(
    make_run: Run, compare: Compare, without_page: None
) -> None:
    runs = [make_run("a", finetuned={0.5: 0.94}), make_run("b", weight=1e-3, finetuned={0.5: 0.9, 0.8: None})]
    rows = rows_of(compare, *runs)
    code, printed, _ = compare(*runs, "--format", "csv")
    lines = list(csv.DictReader(io.StringIO(printed)))
    assert code == 0
    assert [(line["run"], float(line["ratio"]), int(line["params"])) for line in lines] == [
        (row["run"], row["ratio"], row["params"]) for row in rows
    ]
    assert float(lines[0]["accuracy_finetuned"]) == rows[0]["accuracy_finetuned"] == 0.94
    printed = compare(*runs, "--format", "markdown")[1]
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [line[0] for line in table] == ["run", "---", "a", "b", "b"]
    assert all(len(line) == len(table[0]) for line in table)
    assert "    netslim export" in printed


def test_names_are_shown_as_text_in_every_format(make_run: Run, compare: Compare, without_page: None) -> None:
    run = make_run(HOSTILE)
    name = run.name
    assert rows_of(compare, run)[0]["run"] == name
    (line,) = csv.DictReader(io.StringIO(compare(run, "--format", "csv")[1]))
    assert line["run"].startswith("'=1+1 ")
    table = compare(run)[1]
    assert "\nsecond line" not in table
    assert "`x`\\nsecond line" in table
    (_, _, row) = [line for line in compare(run, "--format", "markdown")[1].splitlines() if line.startswith("|")]
    assert "\\| &lt;script&gt;" in row
    assert "\\`x\\`" in row


def test_a_damaged_run_is_named_and_the_others_are_compared(
    make_run: Run, compare: Compare, without_page: None
) -> None:
    whole, *damaged = (make_run(name) for name in ("whole", "no-json", "wrong-type", "no-results", "no-config", "nan"))
    (damaged[0] / "results.json").write_text('{"rows": [')
    (damaged[1] / "results.json").write_text('{"rows": [{"stage": "sparse", "ratio": 0, "accuracy": "high"}]}')
    (damaged[2] / "results.json").unlink()
    (damaged[3] / "config.json").unlink()
    (damaged[4] / "results.json").write_text('{"rows": [{"stage": "sparse", "ratio": 0, "accuracy": NaN}]}')
    code, printed, errors = compare(whole, *damaged, "--format", "json")
    assert code == 0
    states = {row["run"]: row["state"] for row in json.loads(printed)["rows"]}
    assert states == {
        "whole": "done",
        "no-json": "damaged: results.json",
        "wrong-type": "damaged: results.json",
        "no-results": "damaged: results.json",
        "no-config": "damaged: config.json",
        "nan": "damaged: results.json",
    }
    warnings = [line for line in errors.splitlines() if line.startswith("netslim: warning: ")]
    assert len(warnings) == 5
    assert str(damaged[0] / "results.json") in warnings[0]


@pytest.fixture
def sweep(make_run: Run, tmp_path: Path) -> Path:
    """Of two lambdas: the sparse models, members that are done, and one in each other state, also not begun."""
    parent = tmp_path / "sweep"
    members = [Member(weight, 0, ratio) for weight in (0.0, 1e-3) for ratio in (None, 0.3, 0.5)]
    for member in members:
        finetuned = {} if member.ratio is None else {member.ratio: 0.95 if member.ratio == 0.3 else None}
        run = make_run(member.name, weight=member.weight, finetuned=finetuned, parent=parent)
        if member.ratio is not None:
            shutil.rmtree(run / "sparse")
            (run / "sparse").symlink_to(Path("..") / member.sparse.name / "sparse")
    Sweep(parent, "digits", SMALL, [*members, Member(1e-3, 0, 0.7), Member(1e-3, 0, 0.8)], [], {}).write()
    Sweep.read(parent).make([Member(1e-3, 0, 0.8)])
    (parent / "lambda-0.001_seed-0_ratio-0.50" / "failed").write_text("rank 1 lost\n")
    (parent / "lambda-0_seed-0_ratio-0.50" / "preempted").touch()
    return parent


def test_members_of_a_sweep_have_rows_with_their_states_and_share_the_sparse_models(
    sweep: Path, compare: Compare, without_page: None
) -> None:
    rows = rows_of(compare, sweep)
    assert {row["run"]: row["state"] for row in rows} == {
        "lambda-0_seed-0_ratio-0.30": "done",
        "lambda-0_seed-0_ratio-0.50": "incomplete: preempted; finetune missing",
        "lambda-0.001_seed-0_ratio-0.30": "done",
        "lambda-0.001_seed-0_ratio-0.50": "failed: rank 1 lost",
        "lambda-0.001_seed-0_ratio-0.70": "waiting",
        "lambda-0.001_seed-0_ratio-0.80": "waiting",
    }
    waiting = [row for row in rows if row["state"] == "waiting"]
    assert {row[key] for row in waiting for key in ("seconds", "params", "accuracy_cut", "change")} == {None}
    found = gather([sweep])
    assert [(model.weight, model.run) for model in found.sparse] == [
        (0, "lambda-0_seed-0"),
        (1e-3, "lambda-0.001_seed-0"),
    ]
    assert found.warnings == []


def test_a_sweep_of_which_nothing_has_begun_is_shown_as_waiting(sweep: Path, compare: Compare) -> None:
    for member in sweep.iterdir():
        if member.is_dir():
            shutil.rmtree(member)
    code, printed, _ = compare(sweep)
    assert code == 0
    assert printed.count("waiting") == 6
    assert (sweep / "report.html").is_file()


def test_runs_of_one_name_are_told_apart_by_their_paths(
    make_run: Run, compare: Compare, without_page: None, tmp_path: Path
) -> None:
    runs = [make_run("same", parent=tmp_path / parent) for parent in ("a", "b")]
    assert [row["run"] for row in rows_of(compare, *runs)] == [str(run) for run in runs]


def test_different_data_sets_are_said_at_the_top_and_each_has_its_own_choice(
    make_run: Run, compare: Compare, without_page: None
) -> None:
    other = RunConfig(data=DataConfig(source="folder", root=Path("cats"), size=16))
    runs = [
        make_run("digits", finetuned={0.5: 0.95}),
        make_run("cats", finetuned={0.5: 0.5}, base=other, sparse=0.5),
    ]
    code, printed, _ = compare(*runs)
    assert code == 0
    assert printed.splitlines()[0].startswith("These runs are of 2 different data sets (digits, 16x16; folder in cats")
    assert "accuracies of different data sets cannot be compared" in printed.splitlines()[0]
    assert printed.count("The smallest fine-tuned network") == 2
    (head,) = [line.split() for line in printed.splitlines() if line.startswith("run ")]
    assert head[:3] == ["run", "data", "lambda"]


def test_what_else_differs_between_the_runs_is_said(make_run: Run) -> None:
    other = RunConfig(data=DataConfig(size=16, batch_size=32))
    found = gather([make_run("a"), make_run("b", weight=1e-3, seed=1), make_run("c", base=other)])
    assert notes(found, judge(found, 0.01, "params")) == ["The runs also differ in data.batch_size."]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["RUN", "RUN"], ["is given 2 times", "once"]),
        (["RUN", "RUN/../one"], ["is given 2 times", "once"]),
        (["RUN/no"], ["there is no directory", "RUN/no"]),
        (["RUN/.."], ["is neither a run (no config.json) nor a sweep (no sweep.json)"]),
        (["--sort", "params"], ["there is nothing to compare", "name run directories"]),
        (["RUN", "--sort", "size"], ["--sort size is no column", "params"]),
        (["RUN", "--within", "2"], ["within is 2", "less than 1"]),
        (["RUN", "--format", "xml"], ["'xml'", "markdown"]),
        (["RUN", "--out", "RUN"], ["is a directory; name a file"]),
        (["RUN", "--out", "no/page.html"], ["there is no directory no; make it first"]),
        (["RUN/sweep"], ["sweep.json is damaged"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], parts: list[str], make_run: Run, compare: Compare
) -> None:
    run = make_run("one")
    (run / "sweep").mkdir()
    write_json(run / "sweep" / "sweep.json", {"members": [{"name": "a", "weight": "x"}]})
    code, printed, errors = compare(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert (code, printed) == (2, "")
    assert errors.count("\n") == 1, errors
    for part in parts:
        assert part.replace("RUN", str(run)) in errors
    assert not any(Path.cwd().iterdir())


def test_the_view_in_wandb_is_of_the_runs_groups_and_its_address_is_printed(
    make_run: Run, compare: Compare, without_page: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import SimpleNamespace

    asked: list[object] = []

    def save(*arguments: object) -> str:
        asked.extend(arguments)
        return "https://wandb.example/view"

    monkeypatch.setitem(
        sys.modules, "netslim.launch.compare.workspace", SimpleNamespace(save_workspace=save, MOST_RUNS=7)
    )
    grouped = RunConfig(data=DataConfig(size=16), record=RecordConfig(group="mine"))
    runs = [make_run("a"), make_run("b", base=grouped)]
    code, printed, said = compare(*runs, "--wandb")
    assert code == 0
    assert printed.splitlines()[-1] == "W&B workspace: https://wandb.example/view"
    assert asked == ["netslim", None, ["a", "mine"], "netslim a, b"]
    assert "of 8 stages the panels of the workspace show 7" in said
    elsewhere = make_run("c", base=RunConfig(data=DataConfig(size=16), record=RecordConfig(project="other")))
    code, _, errors = compare(*runs, elsewhere, "--wandb")
    assert code == 2
    assert "needs runs of one W&B project, these are of 2: netslim, other" in errors
