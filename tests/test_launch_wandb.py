"""What W&B holds of a run: on disk, after `wandb sync`, and under `wandb agent`."""

import base64
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from stand_in import (
    KEY,
    account,
    server,
    wandb_config,
    wandb_history,
    wandb_lines,
    wandb_records,
    wandb_runs,
    wandb_summary,
)
from test_train_trackers import held
from torch import nn
from whole_run import call as call_plainly

from netslim.launch.config import RunConfig, field_names
from netslim.launch.presets import find_preset, read_preset
from netslim.launch.reading import parse
from netslim.launch.run.directory import claim, read_config
from netslim.launch.run.summary import flat
from netslim.train import Record, RecordConfig
from netslim.train.record.wandb_run import WandbRun

BIN = Path(sys.executable).parent
SWEEP = Path(__file__).parents[1] / "launch" / "wandb" / "sweep.yaml"
STAGES = ("sparse", "prune-0.50", "repair-0.50", "finetune-0.50")
SHORT = [
    *("--sparsify.epochs", "2", "--finetune.epochs", "1", "--model.width", "0.0625", "--data.size", "16"),
    *("--prune.ratio", "0.5", "--repair.images", "128", "--num-processes", "1", "--data.loader", "torch"),
]


def call(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return call_plainly(*command, **{"WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false", **environment})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> tuple[Path, str]:
    """A short run of all stages, offline, with a key in its environment and artifacts; and what it printed.

    TensorBoard, which is always there to be tested, gets it too.
    """
    run = tmp_path_factory.mktemp("wandb") / "tried"
    flags = [*SHORT, "--run-dir", run, "--data.cache", data_cache, "--record.artifacts", "--record.wandb", "offline"]
    flags += ["--record.trackers", "tensorboard"]
    done = call(BIN / "netslim", "run", "digits", *flags)
    assert done.returncode == 0, done.stderr
    return run, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(finished: tuple[Path, str]) -> Path:
    return finished[0]


@pytest.fixture(scope="module")
def stages(run: Path) -> dict[str, Path]:
    """The directory of each stage's W&B run."""
    names = {wandb_config(path)["stage"]: path for path in wandb_runs(run)}
    return dict(zip(STAGES, (names[stage] for stage in ("sparse", "cut", "repaired", "finetuned")), strict=True))


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    with account(tmp_path / "home") as set_address:
        yield set_address


def metrics_of(run: Path, stage: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / stage / "metrics.json").read_text())
    return values


def epochs_of(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sparse", "finetune-0.50"])
def test_the_history_is_that_of_metrics_jsonl(stage: str, run: Path, stages: dict[str, Path]) -> None:
    assert wandb_history(stages[stage]) == epochs_of(run, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_the_summary_has_the_stages_figures_and_what_came_before(
    stage: str, run: Path, stages: dict[str, Path]
) -> None:
    have, metrics = wandb_summary(stages[stage]), metrics_of(run, stage)
    assert {key: have.get(key) for key in metrics} == {
        # W&B keeps each part of a mapping by itself
        key: have.get(key) if isinstance(value, dict) else value
        for key, value in metrics.items()
    }
    done = STAGES[: STAGES.index(stage) + 1]
    names = ("accuracy_sparse", "accuracy_cut", "accuracy_repaired", "accuracy_finetuned")
    assert {key: value for key, value in have.items() if key in names} == {
        name: metrics_of(run, each)["accuracy"] for name, each in zip(names, done, strict=False)
    }
    assert (have["lambda"], have["world_size"]) == (0.01, 1)
    assert have["latency_ms_1"] > 0
    assert have["latency_ms_64"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_another_tracker_gets_the_figures_and_settings_that_wandb_gets(
    stage: str, run: Path, stages: dict[str, Path]
) -> None:
    (have,) = held("tensorboard", run / stage, "netslim")
    lines = wandb_history(stages[stage]) if stage in ("sparse", "finetune-0.50") else []
    for line in lines:
        assert {key: dict(reversed(have.figures[key]))[line["epoch"]] for key in line} == pytest.approx(line, rel=1e-6)
    # with a slash it is part of a table or a picture; the epoch of a stage that has none is W&B's own
    summary = {
        key: value
        for key, value in wandb_summary(stages[stage]).items()
        if isinstance(value, int | float) and "/" not in key and (lines or key != "epoch")
    }
    assert {key: points[-1][1] for key, points in have.figures.items()} == pytest.approx(summary, rel=1e-6)
    assert have.settings == {
        key: value if isinstance(value, str | int | float) else json.dumps(value)
        for key, value in wandb_config(stages[stage]).items()
    }


def test_the_best_of_an_epoch_is_in_the_summary(run: Path, stages: dict[str, Path]) -> None:
    have, lines = wandb_summary(stages["sparse"]), epochs_of(run, "sparse")
    assert have["best_accuracy"] == max(line["accuracy"] for line in lines)
    for loss in ("train_loss", "test_loss"):
        assert have[f"best_{loss}"] == min(line[loss] for line in lines)


def test_the_config_has_the_same_dotted_names_in_every_stage(run: Path, stages: dict[str, Path]) -> None:
    configs = {stage: wandb_config(path) for stage, path in stages.items()}
    about = {"preset": "digits", "world_size": 1, "lambda": 0.01}
    of_run = flat(dataclasses.asdict(read_config(run / "config.json")))
    for config in configs.values():
        assert config.keys() == of_run.keys() | about.keys() | {"stage", "ratio"}
        assert {key: config[key] for key in about} == about
        assert (config["prune.ratio"], config["sparsity.weight"]) == ([0.5], 0.01)
    assert [config["ratio"] for config in configs.values()] == [0.0, 0.5, 0.5, 0.5]


def test_the_histogram_of_each_batchnorm_is_that_of_its_gammas(run: Path, stages: dict[str, Path]) -> None:
    last, weights = wandb_lines(stages["sparse"])[-1], load_file(run / "sparse" / "weights.safetensors")
    norms = [key.removesuffix(".running_mean") for key in weights if key.endswith(".running_mean")]
    assert len(norms) == 8
    for name in norms:
        counts, bins = np.histogram(np.abs(weights[f"{name}.weight"]), bins=64)
        assert last[f"gamma/{name}/values"] == counts.tolist()
        np.testing.assert_allclose(last[f"gamma/{name}/bins"], bins, rtol=1e-6)


def test_pruning_shows_a_table_of_channels_and_two_pictures(run: Path, stages: dict[str, Path]) -> None:
    (line,) = wandb_lines(stages["prune-0.50"])
    assert line["channels_by_layer/_type"] == line["gamma_density/_type"] == "image-file"
    for name in ("channels_by_layer", "gamma_density"):
        picture = (stages["prune-0.50"] / "files" / line[f"{name}/path"]).read_bytes()
        assert picture.startswith(b"\x89PNG")
    table = json.loads((stages["prune-0.50"] / "files" / line["channels/path"]).read_text())
    layers = json.loads((run / "prune-0.50" / "plan.json").read_text())["layers"]
    assert table["columns"] == ["layer", "channels", "kept", "share"]
    assert [row[:3] for row in table["data"]] == [
        [layer["name"], layer["width"], len(layer["kept"])] for layer in layers
    ]


def lineage(run: Path) -> tuple[list[str], list[str]]:
    """The names of the artifacts that went into a W&B run, and of those that came out."""
    found = [record.artifact for record in wandb_records(run) if record.HasField("artifact")]
    named = [each for each in found if each.type in ("dataset", "model")]
    return (
        [each.name for each in named if each.use_after_commit],
        [each.name for each in named if not each.use_after_commit],
    )


def test_artifacts_lead_from_the_images_to_the_fine_tuned_network(stages: dict[str, Path]) -> None:
    assert {stage: lineage(path) for stage, path in stages.items()} == {
        "sparse": (["dataset-digits"], ["tried-sparse"]),
        "prune-0.50": (["dataset-digits", "tried-sparse"], ["tried-prune-0.50"]),
        "repair-0.50": (["dataset-digits", "tried-sparse", "tried-prune-0.50"], ["tried-repair-0.50"]),
        "finetune-0.50": (["dataset-digits", "tried-repair-0.50"], ["tried-finetune-0.50"]),
    }


def test_an_artifact_that_goes_in_is_the_one_that_came_out(stages: dict[str, Path]) -> None:
    """W&B knows artifacts by their content."""
    digests: dict[str, set[str]] = {}
    for path in stages.values():
        for record in wandb_records(path):
            if record.HasField("artifact"):
                digests.setdefault(record.artifact.name, set()).add(record.artifact.digest)
    assert len(digests["tried-sparse"]) == len(digests["tried-repair-0.50"]) == len(digests["dataset-digits"]) == 1


def test_the_artifact_of_the_images_says_how_they_became_squares(stages: dict[str, Path]) -> None:
    found = [each.artifact for each in wandb_records(stages["sparse"]) if each.HasField("artifact")]
    (images,) = [json.loads(each.metadata) for each in found if each.type == "dataset"]
    assert images.items() >= {"source": "digits", "size": 16, "fit": "crop", "upright": True, "white": None}.items()


VARIABLES = {
    "WANDB_PROJECT": "their-project",
    "WANDB_ENTITY": "their-team",
    "WANDB_RUN_GROUP": "their-group",
    "WANDB_NAME": "their name",
    "WANDB_NOTES": "their notes",
    "WANDB_JOB_TYPE": "their-type",
    "WANDB_TAGS": "one, two",
    "WANDB_RUN_ID": "theirid1",
    "WANDB_RESUME": "must",
    "WANDB_CONSOLE": "wrap",
    "WANDB_MODE": "offline",
}


def starts_of(directory: Path) -> dict[str, Any]:
    """What W&B was told of each run as it began, by the stage."""
    found = [(path, each.run) for path in wandb_runs(directory) for each in wandb_records(path) if each.HasField("run")]
    return {start.display_name.rpartition(" ")[2]: start for _, start in found}


def test_what_wandbs_variables_say_of_a_run_is_the_default_of_its_fields(
    tmp_path: Path, address: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**VARIABLES, "WANDB_DIR": str(tmp_path / "elsewhere")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(WandbRun, "told", set())
    of_flags = ["--record.group", "mine", "--record.tags", "three", "--record.project", "own", "--record.notes", "My."]
    for stage, flags in (("sparse", []), ("finetune", of_flags)):
        config = parse("netslim", "", find_preset("digits")(), flags).record
        place, is_last = tmp_path / "run" / stage, stage == "finetune"
        with Record(stage, place, is_main=True, config=config, run_name="run", is_last=is_last) as record:
            record.finish({"accuracy": 0.9})
    assert not (tmp_path / "run" / "wandb").exists()
    starts = starts_of(tmp_path / "elsewhere")
    sparse, last = starts["sparse"], starts["finetune"]
    assert (sparse.project, sparse.entity, sparse.run_group) == ("their-project", "their-team", "their-group")
    assert (sparse.display_name, sparse.notes, sparse.job_type) == ("their name sparse", "their notes", "their-type")
    assert list(sparse.tags) == ["one", "two"]
    assert (last.project, last.entity, last.run_group) == ("own", "their-team", "mine")
    assert (last.notes, list(last.tags)) == ("My.", ["three"])
    assert (sparse.run_id == "theirid1", last.run_id) == (False, "theirid1")
    assert capfd.readouterr().err.splitlines() == [
        "sparse: warning: WANDB_RESUME is ignored: a stage goes on in the W&B run that its checkpoint names",
        "sparse: warning: WANDB_CONSOLE is ignored: what a run prints stays here",
    ]


def test_a_run_that_goes_on_is_recorded_where_it_began_unless_a_flag_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run-dir", str(tmp_path)]
    monkeypatch.setenv("WANDB_PROJECT", "first")
    monkeypatch.setenv("WANDB_TAGS", "one")
    claim(tmp_path, "digits", read_preset("netslim run", "digits", flags))
    monkeypatch.setenv("WANDB_PROJECT", "second")
    assert read_preset("netslim run", "digits", flags).record.project == "second"  # nothing has begun
    (tmp_path / "sparse").mkdir()
    capfd.readouterr()
    record = read_preset("netslim run", "digits", flags).record
    assert (record.project, record.tags) == ("first", ("one",))
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"netslim: warning: {tmp_path} goes on in W&B as it began, with record.project 'first'; give a flag for another"
    )
    monkeypatch.delenv("WANDB_TAGS")
    given = read_preset("netslim run", "digits", [*flags, "--record.project=third"]).record
    assert (given.project, given.tags) == ("third", ("one",))
    (tmp_path / "mine.yaml").write_text("record: {tags: [two]}")
    given = read_preset("netslim run", "digits", [*flags, "--config", str(tmp_path / "mine.yaml")]).record
    assert (given.project, given.tags) == ("first", ("two",))


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_without_a_home_to_write_to_nothing_of_wandbs_own_reaches_the_terminal(
    home: str | None, tmp_path: Path
) -> None:
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom netslim.train import Record, RecordConfig\n"
        "config = RecordConfig(wandb='offline')\n"
        "with Record('sparse', Path(sys.argv[1]), is_main=True, config=config) as record:\n"
        "    line = {'epoch': 1, 'train_loss': 0.5, 'accuracy': 0.9, 'images_per_second': 10.0}\n"
        "    record.epoch(line, torch.nn.Identity())\n"
    )
    hidden = ("HOME", "XDG_CACHE_HOME", "WANDB_SERVICE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run" / "sparse"],
        env={**environment, "TMPDIR": str(tmp_path), **({} if home is None else {"HOME": home})},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout == "sparse: epoch 1  loss 0.500  accuracy 0.9000  10 images/s\n"
    assert [line["epoch"] for line in wandb_lines(wandb_runs(tmp_path / "run")[0])] == [1]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", f"netslim-{os.getuid()}"}


def test_the_key_is_in_no_file_and_no_output(finished: tuple[Path, str]) -> None:
    run, printed = finished
    assert KEY not in printed
    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_wandb_sync_sends_what_is_in_the_run_directory(run: Path, stages: dict[str, Path], tmp_path: Path) -> None:
    places = {name: str(tmp_path) for name in ("WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_DIR")}
    with server() as there:
        done = call(BIN / "wandb", "sync", *stages.values(), WANDB_BASE_URL=there.url, **places)
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    assert there.keys == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    ids = {stage: path.name.rpartition("-")[2] for stage, path in stages.items()}
    for stage, identity in ids.items():
        upserts = [sent for sent in there.variables("UpsertBucket") if sent["name"] == identity]
        assert {sent["groupName"] for sent in upserts} - {None} == {"tried"}
        assert {sent["jobType"] for sent in upserts} - {None} == {stage.split("-")[0]}
        config = {key: each["value"] for key, each in json.loads(upserts[0]["config"]).items()}
        assert {key: config[key] for key in wandb_config(stages[stage])} == wandb_config(stages[stage])
        (summary,) = there.streams[identity, "wandb-summary.jsonl"] or there.streams[identity, "wandb-summary.json"]
        assert summary["accuracy"] == metrics_of(run, stage)["accuracy"]
        uploaded = json.loads(there.files[f"{identity}/wandb-summary.json"])
        assert uploaded["file_mb"] == metrics_of(run, stage)["file_mb"]
    for stage in ("sparse", "finetune-0.50"):
        lines = there.streams[ids[stage], "wandb-history.jsonl"]
        assert [{key: line[key] for key in want} for line, want in zip(lines, epochs_of(run, stage), strict=True)] == (
            epochs_of(run, stage)
        )
    pictures = [name for name in there.files if name.startswith(f"{ids['prune-0.50']}/media/images/")]
    assert len(pictures) == 2
    used = {(sent["input"]["runName"], sent["input"]["artifactID"]) for sent in there.variables("UseArtifact")}
    assert {(ids["prune-0.50"], "tried-sparse"), (ids["finetune-0.50"], "tried-repair-0.50")} <= used


TRIALS = [
    {"sparsity.weight": {"value": 0.002}, "prune.ratio": {"value": 0.7}},
    {"sparsity.weight": {"value": 0.03}, "prune.ratio": {"value": 0.5}},
]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the real `wandb agent` starts for two trials: command line and environment, as `accelerate` sees them."""
    directory = tmp_path_factory.mktemp("agent")
    fake = directory / "bin" / "accelerate"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"with open({str(directory / 'seen')!r}, 'a') as file:\n"
        "    print(json.dumps({'arguments': sys.argv[1:], 'environment': dict(os.environ)}), file=file)\n"
    )
    fake.chmod(0o755)
    orders = [
        {"type": "run", "run_id": f"trial00{number}", "program": "netslim.launch.recipe", "args": arguments}
        for number, arguments in enumerate(TRIALS)
    ]
    with server() as there:
        about = {"id": "1", "name": "sweep001", "method": "bayes", "state": "RUNNING", "config": SWEEP.read_text()}
        there.answers |= {
            "SweepWithRuns": lambda _: {"project": {"sweep": {**about, "runs": {"edges": []}}}},
            "CreateAgent": lambda _: {"createAgent": {"agent": {"id": "1"}}},
            "Heartbeat": lambda _: {
                "agentHeartbeat": {"agent": {"id": "1"}, "commands": json.dumps([orders.pop(0)] if orders else [])}
            },
        }
        done = subprocess.run(
            [BIN / "wandb", "agent", "--count", "2", "someone/netslim/sweep001"],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={
                **os.environ,
                "PATH": f"{fake.parent}:{os.environ['PATH']}",
                "WANDB_API_KEY": KEY,
                "WANDB_BASE_URL": there.url,
                "WANDB_CONFIG_DIR": str(directory),
                "WANDB_ERROR_REPORTING": "false",
            },
        )
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    return [json.loads(line) for line in (directory / "seen").read_text().splitlines()]


def test_an_agent_starts_our_recipe_with_the_sweeps_values_each_trial_in_a_directory_of_its_own(
    trials: list[dict[str, Any]],
) -> None:
    for number, (trial, wanted) in enumerate(zip(trials, TRIALS, strict=True)):
        launch, dash_m, module, preset, *flags = trial["arguments"]
        assert (launch, dash_m, module, preset) == ("launch", "-m", "netslim.launch.recipe", "digits")
        config = parse("test", "", find_preset(preset)(), flags)
        assert config.sparsity.weight == wanted["sparsity.weight"]["value"]
        assert config.prune.ratio == (wanted["prune.ratio"]["value"],)
        assert config.run_dir == Path(f"runs/sweep-sweep001/trial00{number}")


def test_a_sweep_searches_over_fields_that_there_are_and_by_a_figure_that_there_is(stages: dict[str, Path]) -> None:
    sweep = yaml.safe_load(SWEEP.read_text())
    assert set(sweep["parameters"]) <= set(field_names(RunConfig()))
    assert sweep["metric"] == {"name": "accuracy_finetuned", "goal": "maximize"}
    assert sweep["metric"]["name"] in wandb_summary(stages["finetune-0.50"])


# W&B leaves the file with the sweep's values open
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_under_an_agent_the_last_stage_alone_is_the_trials_run(
    trials: list[dict[str, Any]],
    tmp_path: Path,
    address: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By the environment that the agent gave its second trial."""
    monkeypatch.setattr(WandbRun, "told", set())
    for name, value in trials[1]["environment"].items():
        if name.startswith("WANDB_") and name not in ("WANDB_CONFIG_DIR", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    config = RecordConfig(wandb="offline", project="another", entity="nobody")
    settings = {"prune.ratio": [0.5], "seed": 0}
    ids = {}
    for stage in ("sparse", "finetune-0.50"):
        record = Record(
            stage,
            tmp_path / "run" / stage,
            is_main=True,
            config=config,
            run_name="run",
            settings=settings,
            is_last=stage == "finetune-0.50",
        )
        with record:
            record.finish({"accuracy": 0.9})
            ids[stage] = record.wandb_id
    starts = {
        record.run.display_name: record.run
        for path in wandb_runs(tmp_path / "run")
        for record in wandb_records(path)
        if record.HasField("run")
    }
    sparse, last = starts["run sparse"], starts["run finetune-0.50"]
    assert (last.run_id, last.sweep_id) == (ids["finetune-0.50"], "sweep001") == ("trial001", "sweep001")
    assert (sparse.run_id, sparse.sweep_id) == (ids["sparse"], "")
    assert re.fullmatch("[0-9a-f]{8}", sparse.run_id)
    assert {(start.entity, start.project) for start in starts.values()} == {("someone", "netslim")}
    for path in wandb_runs(tmp_path / "run"):
        # the search reads a trial's values from its config, as it gave them
        assert wandb_config(path) == {"prune.ratio": 0.5, "sparsity.weight": 0.03, "seed": 0}
    assert capfd.readouterr().err.splitlines() == [
        f"sparse: warning: record.{field} is not taken: the sweep that this is a trial of is in {theirs}"
        for field, theirs in (("project another", "netslim"), ("entity nobody", "someone"))
    ]


def test_a_trial_that_is_taken_up_again_stays_the_trials_run(
    tmp_path: Path, address: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep001")
    monkeypatch.setenv("WANDB_RUN_ID", "trial001")
    line = {"epoch": 1, "train_loss": 0.5, "accuracy": 0.9, "images_per_second": 10.0}
    for _ in range(2):
        config = RecordConfig(wandb="offline")
        with Record("finetune-0.50", tmp_path / "last", is_main=True, config=config, is_last=True) as record:
            record.resume([line], record.wandb_id)
            record.epoch({**line, "epoch": 2}, nn.Identity())
    starts = [each.run for path in wandb_runs(tmp_path) for each in wandb_records(path) if each.HasField("run")]
    assert {(start.run_id, start.sweep_id) for start in starts} == {("trial001", "sweep001")}


@pytest.mark.parametrize("status", [200, 403, 404])
def test_an_entity_that_the_server_refuses_is_named_and_the_record_goes_on_offline(
    status: int, tmp_path: Path, address: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    line = {"epoch": 1, "train_loss": 0.5, "accuracy": 0.9, "images_per_second": 10.0}
    with server() as there:
        address(there.url)
        there.refusals["UpsertBucket"] = (status, "permission denied")
        config = RecordConfig(wandb="online", entity="nobody")
        with Record("sparse", tmp_path / "sparse", is_main=True, config=config) as record:
            assert isinstance(record._wandb, WandbRun)
            assert record._wandb._probe is not None
            record._wandb._probe.join()
            record.epoch(line, nn.Identity())
    (warning,) = capfd.readouterr().err.splitlines()
    assert "W&B could not start online in nobody/netslim (" in warning
    assert "permission denied" in warning
    assert "name another --record.entity" in warning
    assert KEY not in warning
    assert wandb_history(wandb_runs(tmp_path)[-1]) == [line]
