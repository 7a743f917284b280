"""What trackers beside W&B hold of a stage: read back by their own packages, none of which is stood in for."""

import importlib.util
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_args

import pytest
from conftest import Disk
from test_train_distributed import Shares, network, new_runtime
from test_train_resume import CrashError, Dying
from torch import nn

from netslim.train import CheckpointConfig, EngineConfig, FitConfig, Record, RecordConfig, Runtime, Saver, Store, fit
from netslim.train.record import tracker_run
from netslim.train.record.trackers import TrackerName

SETTINGS = {"preset": "digits", "prune.ratio": [0.5], "sparsity.weight": 0.01, "seed": 0, "cpu": True, "run_dir": None}
SUMMARY = {
    "seconds": 40.0,
    "params": 1000,
    "rules": "a",
    "spared": {"conv1": 2},
    "latency_ms_64": None,
}
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"needs the extra: pip install '.[{name}]'"
        ),
    )
    for name in get_args(TrackerName)
]
WITH_IDENTITY = [name for name in NAMES if name.values != ("tensorboard",)]
needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="needs the extra: pip install '.[mlflow]'"
)
needs_trackio = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="needs the extra: pip install '.[trackio]'"
)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        run = new_runtime(EngineConfig())
        yield run
        run.close()


@pytest.fixture(autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """None of the trackers' variables, afterwards either; Trackio's own folder, which it takes once, is a spare one."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TRACKIO_"))]:
        del os.environ[name]
    os.environ["TRACKIO_DIR"] = before.get("TRACKIO_DIR") or str(tmp_path_factory.mktemp("trackio"))
    if "trackio" in sys.modules:
        os.environ["TRACKIO_DIR"] = str(sys.modules["trackio"].TRACKIO_DIR)
    yield
    os.environ.clear()
    os.environ.update(before)


@dataclass
class Held:
    """What a tracker holds of one stage."""

    figures: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By name: at which step, what; in the order in which the tracker shows them."""
    settings: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def held(name: str, stage: Path, project: str) -> list[Held]:
    """The runs of a stage in a tracker."""
    return {"tensorboard": _in_tensorboard, "mlflow": _in_mlflow, "trackio": _in_trackio}[name](stage, project)


def _in_tensorboard(stage: Path, project: str) -> list[Held]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def figures(directory: Path) -> dict[str, list[tuple[int, float]]]:
        found = EventAccumulator(str(directory)).Reload()
        return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    (settings,) = (stage / "tensorboard").glob("*/events.*")
    plugin = EventAccumulator(str(settings.parent)).Reload().SummaryMetadata("_hparams_/session_start_info")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = HParamsPluginData.FromString(plugin.plugin_data.content).session_start_info.hparams
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in content.items()}
    return [Held(figures(stage / "tensorboard"), values)]


def _in_mlflow(stage: Path, project: str) -> list[Held]:
    from mlflow import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient((stage.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    assert not {"group", "job_type"} & experiment.tags.keys()
    runs = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name.endswith(stage.name)]
    return [
        Held(
            {
                key: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
            run.data.params,
            {**run.data.tags, "name": run.info.run_name, "status": run.info.status},
        )
        for run in runs
    ]


def _in_trackio(stage: Path, project: str) -> list[Held]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for run in trackio.Api().runs(project):
        figures: dict[str, list[tuple[int, float]]] = {}
        for line in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
            for key in line.keys() - {"timestamp", "step"}:
                ours = "step" if key == "optimizer_step" else key
                figures.setdefault(ours, []).append((line["step"], line[key]))
        config = run.config or {}
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        name = run.name.rpartition(" ")[0]
        found.append(Held(figures, settings, {"name": name, "group": config["_Group"]}))
    return [each for each in found if each.about["name"].endswith(stage.name)]


def epochs(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "step": 22 * epoch,
            "train_loss": 1 / epoch,
            "accuracy": 0.6 + epoch / 10,
            "images_per_second": 10.0,
            "seconds": 2.5,
        }
        for epoch in range(first, last + 1)
    ]


def history_of(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    return {key: [(line["epoch"], line[key]) for line in lines] for key in lines[0]}


def assert_same(have: dict[str, list[tuple[int, float]]], want: dict[str, list[tuple[int, float]]]) -> None:
    """The same names, steps and values; TensorBoard keeps float32."""
    assert have.keys() == want.keys()
    for key, points in want.items():
        assert [step for step, _ in have[key]] == [step for step, _ in points], key
        assert [value for _, value in have[key]] == pytest.approx([value for _, value in points], rel=1e-6), key


def config_for(name: str, place: Path, **fields: Any) -> RecordConfig:
    """With a project of the test's own: Trackio has one folder for all."""
    return RecordConfig(wandb="disabled", trackers=(name,), project=place.parent.name, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_gets_each_epochs_figures_the_summary_and_the_settings(
    name: str, tmp_path: Path, runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    stage, config = tmp_path / "my run" / "sparse", config_for(name, tmp_path / "my run", notes="mine", tags=("a", "b"))
    with Record("sparse", stage, is_main=True, config=config, run_name="my run", settings=SETTINGS) as record:
        for line in epochs(1, 3):
            record.epoch(line, nn.Identity())
        record.finish({**epochs(3, 3)[0], **SUMMARY})
    (found,) = held(name, stage, config.project)
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    want = history_of(lines)
    want["seconds"].append((3, 40.0))  # of the stage, as in W&B's summary; the accuracy is the last epoch's
    assert_same(found.figures, {**want, "params": [(3, 1000.0)], "spared.conv1": [(3, 2.0)]})
    text = {"prune.ratio": "[0.5]", "run_dir": "null"}
    kinds: dict[str, Callable[[Any], Any]] = {"mlflow": str, "tensorboard": lambda value: value, "trackio": lambda x: x}
    assert found.settings == {key: kinds[name](value) for key, value in {**SETTINGS, **text}.items()}
    if name == "tensorboard":
        assert found.about == {}
    else:
        assert (found.about["name"], found.about["group"]) == ("my run sparse", "my run")
    if name == "mlflow":
        about = {key: found.about[key] for key in ("job_type", "tags", "mlflow.note.content", "status")}
        assert about == {"job_type": "sparse", "tags": "a, b", "mlflow.note.content": "mine", "status": "FINISHED"}
    printed = capfd.readouterr()
    assert (printed.err, len(printed.out.splitlines())) == ("", 3), "trackers say nothing of their own"


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_that_is_taken_up_again_goes_on_in_its_run_with_each_epoch_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a training that dies in the second epoch, after the first one's checkpoint."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    stage, config = tmp_path / "run" / "sparse", config_for(name, tmp_path / "run")
    for batches in (5, 100):  # of four an epoch
        run = new_runtime(EngineConfig())
        saver = Saver(Store(stage / "checkpoints", 2), run, CheckpointConfig())
        record = Record("sparse", stage, is_main=True, config=config, run_name="run", settings=SETTINGS)
        images = Dying(run, 4, batches=batches)
        with suppress(CrashError), record:
            fit(network(), images, Shares(run, 10), FitConfig(epochs=2), run=run, record=record, saver=saver)
        run.close()
    (found,) = held(name, stage, config.project)
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert_same(found.figures, history_of(lines))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("known", [0, 2, 4])
def test_a_run_gets_the_epochs_that_it_does_not_have_and_no_other(
    name: str, known: int, tmp_path: Path, runtime: Runtime
) -> None:
    """It was named later, its last words were lost, or it is ahead of the checkpoint."""
    stage, config = tmp_path / "run" / "sparse", config_for(name, tmp_path / "run")
    for earlier, new in ((0, known), (3, 4)):
        if new:
            with Record("sparse", stage, is_main=True, config=config, run_name="run", settings=SETTINGS) as record:
                record.resume(epochs(1, earlier))
                for line in epochs(earlier + 1, new):
                    record.epoch(line, nn.Identity())
    (found,) = held(name, stage, config.project)
    assert_same(found.figures, history_of(epochs(1, 4)))


@pytest.mark.parametrize("name", WITH_IDENTITY)
def test_stages_and_runs_of_one_name_are_not_mixed_up(name: str, tmp_path: Path, runtime: Runtime) -> None:
    places = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    config = config_for(name, tmp_path / "run")
    for place in places * 2:
        with Record("sparse", place / "sparse", is_main=True, config=config, run_name="run") as record:
            if (place / "sparse" / "trackers.json").is_file():
                record.resume(epochs(1, 1))
            record.epoch(epochs(1, 1)[0], nn.Identity())
    found = held(name, places[0] / "sparse", config.project)
    assert len(found) == (2 if name == "trackio" else 1)  # MLflow's store is the run directory's own
    for each in found:
        assert_same(each.figures, history_of(epochs(1, 1)))


@needs_mlflow
def test_a_stage_that_fails_is_failed_in_mlflow_and_running_again_once_it_goes_on(
    tmp_path: Path, runtime: Runtime
) -> None:
    stage, config = tmp_path / "run" / "sparse", config_for("mlflow", tmp_path / "run")
    record = Record("sparse", stage, is_main=True, config=config, run_name="run")
    with suppress(CrashError), record:
        record.epoch(epochs(1, 1)[0], nn.Identity())
        raise CrashError
    assert held("mlflow", stage, config.project)[0].about["status"] == "FAILED"
    with Record("sparse", stage, is_main=True, config=config, run_name="run") as record:
        record.resume(epochs(1, 1))
        record.epoch(epochs(2, 2)[0], nn.Identity())
        assert held("mlflow", stage, config.project)[0].about["status"] == "RUNNING"
    assert held("mlflow", stage, config.project)[0].about["status"] == "FINISHED"


@needs_mlflow
def test_mlflow_goes_where_its_variables_say_and_each_stage_has_a_run_of_its_own(
    tmp_path: Path, runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    os.environ["MLFLOW_RUN_ID"] = "0" * 32
    os.environ["MLFLOW_TRACKING_URI"] = (tmp_path / "store" / "mlruns").as_uri()
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "theirs"
    os.environ["MLFLOW_TAGS"] = '{"team": "vision"}'
    for stage in ("sparse", "prune-0.50"):
        config = config_for("mlflow", tmp_path / "run")
        with Record(stage, tmp_path / "run" / stage, is_main=True, config=config, run_name="run") as record:
            record.finish({"accuracy": 0.9})
    (found,) = held("mlflow", tmp_path / "store" / "prune-0.50", "theirs")
    assert (found.figures, found.about["team"]) == ({"accuracy": [(0, 0.9)]}, "vision")
    assert len(held("mlflow", tmp_path / "store" / "sparse", "theirs")) == 1
    assert not (tmp_path / "run" / "mlruns").exists()
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning == (
        "sparse: warning: MLFLOW_RUN_ID is ignored: each stage has an MLflow run of its own, in which it goes on"
    )


@needs_mlflow
def test_a_stage_whose_store_is_another_one_by_now_gets_a_new_run_and_says_so(
    tmp_path: Path, runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_for("mlflow", tmp_path / "run")
    for store in ("one", "two"):
        os.environ["MLFLOW_TRACKING_URI"] = (tmp_path / store / "mlruns").as_uri()
        with Record("sparse", tmp_path / "run" / "sparse", is_main=True, config=config, run_name="run") as record:
            record.resume(epochs(1, 2))
            record.epoch(epochs(3, 3)[0], nn.Identity())
    (found,) = held("mlflow", tmp_path / "two" / "sparse", config.project)
    assert_same(found.figures, history_of(epochs(1, 3)))
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.startswith("sparse: warning: MLflow has no run ")


class Listener(threading.Thread):
    """A server that hangs up on whoever calls, or is silent."""

    def __init__(self, *, hangs_up: bool) -> None:
        super().__init__(daemon=True)
        self._hangs_up, self.num_calls = hangs_up, 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._kept: list[socket.socket] = []

    def run(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._socket.accept()
                self.num_calls += 1
                caller.close() if self._hangs_up else self._kept.append(caller)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        for each in (self._socket, *self._kept):
            each.close()


def record_stage(config: RecordConfig, stage: Path) -> None:
    """Three epochs and a summary, all of which reach the disk."""
    with Record(stage.name, stage, is_main=True, config=config, run_name="run") as record:
        for line in epochs(1, 3):
            record.epoch(line, nn.Identity())
        record.finish({"accuracy": 0.9})
    assert (stage / "metrics.jsonl").read_text().count("\n") == 3


@needs_mlflow
def test_a_server_that_hangs_up_is_asked_three_times_a_stage_which_goes_on(
    tmp_path: Path, runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    os.environ |= {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0"}  # seconds
    with Listener(hangs_up=True) as there:
        os.environ["MLFLOW_TRACKING_URI"] = there.url
        for stage in ("sparse", "prune-0.50"):
            record_stage(config_for("mlflow", tmp_path / "run"), tmp_path / "run" / stage)
        assert there.num_calls == 6
    for stage, warning in zip(("sparse", "prune-0.50"), capfd.readouterr().err.splitlines(), strict=True):
        assert warning.startswith(f"{stage}: warning: MLflow could not start (")
        assert warning.endswith("); this stage goes on without it")


@needs_mlflow
def test_a_server_that_is_silent_is_waited_for_once_a_stage_which_goes_on(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker_run, "WAIT_SECONDS", 0.5)
    before = logging.root.manager.disable
    with Listener(hangs_up=False) as there:
        os.environ["MLFLOW_TRACKING_URI"] = there.url
        record_stage(config_for("mlflow", tmp_path / "run"), tmp_path / "run" / "sparse")
    assert logging.root.manager.disable == before
    assert capfd.readouterr().err.splitlines() == [
        "sparse: warning: MLflow could not start (no answer in 0.5 s); this stage goes on without it"
    ]


def test_a_disk_that_is_full_for_a_tracker_is_one_line_and_the_stage_goes_on(
    disk: Disk, tmp_path: Path, runtime: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the folder of TensorBoard's alone, so that what is written beside it has room."""
    stage, config = tmp_path / "run" / "sparse", config_for("tensorboard", tmp_path / "run")
    stage.mkdir(parents=True)
    (stage / "tensorboard").symlink_to(disk.path)
    with Record("sparse", stage, is_main=True, config=config, run_name="run", settings=SETTINGS) as record:
        record.epoch(epochs(1, 1)[0], nn.Identity())
        disk.fill()
        for line in epochs(2, 200):
            record.epoch({**line, **{f"figure {index}": 0.5 for index in range(20)}}, nn.Identity())
        record.finish({"accuracy": 0.9})
    assert (stage / "metrics.jsonl").read_text().count("\n") == 200
    assert capfd.readouterr().err.splitlines() == [
        "sparse: warning: TensorBoard could not log ([Errno 28] No space left on device); this stage goes on without it"
    ]


@needs_trackio
@pytest.mark.filterwarnings("default")
def test_what_trackio_warns_of_is_one_line(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    stage, config = tmp_path / "run" / "sparse", config_for("trackio", tmp_path / "run")
    with Record("sparse", stage, is_main=True, config=config, run_name="run") as record:
        record.epoch(epochs(1, 1)[0], nn.Identity())
        monkeypatch.setattr(SQLiteStorage, "bulk_log", fail)
        for line in epochs(2, 3):
            record.epoch(line, nn.Identity())
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.startswith("sparse: warning: Trackio says: ")
    assert "No space left on device" in warning


@needs_trackio
def test_trackio_asks_nobody_where_the_machine_has_a_token_for_the_hub(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror

    monkeypatch.setenv("HF_TOKEN", f"hf_{'a' * 34}")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    stage, config = tmp_path / "run" / "sparse", config_for("trackio", tmp_path / "run")
    with Record("sparse", stage, is_main=True, config=config, run_name="run") as record:
        record.epoch(epochs(1, 1)[0], nn.Identity())
    assert asked == []
    assert len(held("trackio", stage, config.project)) == 1


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_done(
    name: str, tmp_path: Path, netslim: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == name else find(each))
    for command in (["run", "digits"], ["finetune", "digits"], ["run", "digits", "--dry-run"], ["sweep", "digits"]):
        code, said = netslim(*command, "--record.trackers", name, "--run-dir", tmp_path / "run")
        title = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "Trackio"}[name]
        assert (code, said) == (
            2,
            f"netslim: record.trackers {name}: {title} is not installed; pip install 'netslim[{name}]'\n",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["wandb"], "invalid choice 'wandb' for argument '--record.trackers'. Expected one of"),
        (
            ["tensorboard", "tensorboard"],
            "record.trackers names a tracker twice in ('tensorboard', 'tensorboard'); name",
        ),
    ],
)
def test_a_tracker_that_there_is_not_or_twice_is_refused(
    flags: list[str], reason: str, netslim: Callable[..., tuple[int, str]]
) -> None:
    code, said = netslim("config", "digits", "--record.trackers", *flags)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"netslim: {reason}")


def test_other_ranks_open_no_tracker(tmp_path: Path) -> None:
    config = config_for("tensorboard", tmp_path / "run")
    with Record("sparse", tmp_path / "run" / "sparse", is_main=False, config=config) as record:
        record.epoch(epochs(1, 1)[0], nn.Identity())
        record.finish(SUMMARY)
        assert not record.has_summary
    assert not (tmp_path / "run").exists()
