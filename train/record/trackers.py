"""Trackers beside W&B: TensorBoard, MLflow and Trackio, through Accelerate's classes for them.

These are clients like W&B's own and have nothing to do with ranks: all that they ask Accelerate is whether this is the
main process.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

TrackerName = Literal["tensorboard", "mlflow", "trackio"]
"""Also the name of its package, and of our extra with it."""
TITLES: dict[TrackerName, str] = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "Trackio"}
_MLFLOW_DEFAULTS = {
    # three attempts, of 5 s each where nothing answers: by itself MLflow goes on for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # It would rather have SQLite than plain files. That takes packages of its own and seconds to begin with, and locks,
    # which many a cluster's storage does not have.
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
_ADDRESS, _RUN_ID = "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"
_TRACKIO_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")

Say = Callable[[str], None]
"""Prints a warning line."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a tracker is told of a stage: the same as W&B."""

    directory: Path
    """The stage's own."""
    project: str
    group: str
    name: str
    job_type: str
    notes: str | None
    tags: Sequence[str]
    settings: Mapping[str, Any]

    @property
    def parameters(self) -> dict[str, bool | int | float | str]:
        """The settings as trackers take them; what is no number and no text is JSON."""
        plain = (bool, int, float, str)
        return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in self.settings.items()}

    @property
    def labels(self) -> dict[str, str]:
        return {"group": self.group, "job_type": self.job_type, "tags": ", ".join(self.tags)}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A stage's run in a tracker, begun or taken up again."""

    tracker: Any
    """Of Accelerate, started."""
    identity: str | None = None
    """By which the run is found again; None: it lies in the stage's directory."""
    last_epoch: int = 0
    """The run has all epochs up to this one."""
    fail: Callable[[], None] = lambda: None
    """Notes that the stage failed."""
    release: Callable[[], None] = lambda: None
    """Undoes what was changed of this process."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names that the tracker keeps for itself, and ours for them there."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ValueError, which names the extra, for a tracker that is not installed; nothing is imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"record.trackers {name}: {TITLES[name]} is not installed; pip install 'netslim[{name}]'")


def open_tracker(name: TrackerName, about: About, identity: str | None, say: Say) -> Opened:
    """Begin the stage's run in a tracker, or go on in the one of this identity; raises whatever the tracker does."""
    with contextlib.ExitStack() as changes:
        opened = _OPEN[name](about, identity, say, changes)
        return dataclasses.replace(opened, release=changes.pop_all().close)


def _open_tensorboard(about: About, identity: str | None, say: Say, changes: contextlib.ExitStack) -> Opened:
    """Event files in the stage's directory; each process writes one of its own, with all epochs."""
    from accelerate.tracking import TensorBoardTracker

    # what ends its thread it raises too, when more is written
    changes.enter_context(_replaced(threading, "excepthook", _without_threads_of("tensorboard", threading.excepthook)))
    is_new = not (about.directory / "tensorboard").exists()
    # what earlier files hold from step 0 on, which is all, counts no more
    tracker = TensorBoardTracker("tensorboard", about.directory, purge_step=0)
    tracker.start()
    if is_new:
        tracker.store_init_configuration(about.parameters)
    return Opened(tracker=tracker)


def _open_mlflow(about: About, identity: str | None, say: Say, changes: contextlib.ExitStack) -> Opened:
    """A run in the store of MLFLOW_TRACKING_URI, or in one of the run directory's own."""
    for variable, value in _MLFLOW_DEFAULTS.items():
        os.environ.setdefault(variable, value)
    if os.environ.pop(_RUN_ID, None):
        say(f"{_RUN_ID} is ignored: each stage has an MLflow run of its own, in which it goes on")
    import mlflow
    from accelerate.tracking import MLflowTracker

    address = os.environ.get(_ADDRESS)
    mlflow.set_tracking_uri(address or about.directory.parent / "mlruns")
    if not address:
        os.environ.pop(_ADDRESS, None)  # MLflow leaves it there, where it would be that of the next run directory too
    tracker = MLflowTracker(about.project, run_name=about.name, description=about.notes)
    tracker.tags = {**about.labels, **(tracker.tags or {})}  # those of MLFLOW_TAGS
    _make_experiment(tracker.experiment_name)
    tracker.run_id = _known_run(identity, say)
    tracker.start()
    if tracker.run_id is None:
        tracker.store_init_configuration(about.parameters)
    run = tracker.tracker
    return Opened(
        tracker=tracker,
        identity=run.info.run_id,
        last_epoch=int(run.data.metrics.get("epoch", 0)),
        fail=partial(mlflow.end_run, "FAILED"),
    )


def _make_experiment(name: str) -> None:
    """Make MLflow's experiment unless it is there: Accelerate's class would take the stage's tags for its own."""
    import mlflow

    if mlflow.get_experiment_by_name(name) is None:
        try:
            mlflow.create_experiment(name)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or mlflow.get_experiment_by_name(name) is None:
                raise  # else another run has just made it


def _known_run(identity: str | None, say: Say) -> str | None:
    """The identity, where the store has such a run."""
    import mlflow

    try:
        return identity and mlflow.get_run(identity).info.run_id
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        say(f"MLflow has no run {identity} where this stage began; it goes on in a new one")
        return None


def _open_trackio(about: About, identity: str | None, say: Say, changes: contextlib.ExitStack) -> Opened:
    """A run in Trackio's own folder, or where its variables say.

    Trackio finds a run again by its name alone, so that there has to be no other of that name.
    """
    from accelerate.tracking import TrackioTracker
    from huggingface_hub import constants

    name = identity or f"{about.name} {secrets.token_hex(4)}"
    # it raises nothing: what goes wrong, in a thread of its own too, is a warning of Python's
    changes.enter_context(_replaced(warnings, "showwarning", _saying("trackio", say, warnings.showwarning)))
    # the settings here: Accelerate's class would add one of its own to them
    tracker = TrackioTracker(
        about.project, name=name, group=about.group, config=about.parameters, resume="allow", embed=False
    )
    # else it asks Hugging Face's hub whose the token is, where this machine has one
    is_elsewhere = any(map(os.environ.get, _TRACKIO_ELSEWHERE))
    with _replaced(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE or not is_elsewhere):
        tracker.start()
    return Opened(
        tracker=tracker,
        identity=name,
        last_epoch=tracker.tracker._next_step - 1,  # which it has found here or at its server
        renamed={"step": "optimizer_step"},
    )


_OPEN: dict[TrackerName, Callable[[About, str | None, Say, contextlib.ExitStack], Opened]] = {
    "tensorboard": _open_tensorboard,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Have an attribute of a module be this for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _without_threads_of(package: str, show: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for errors that end threads, which shows none of a package's."""

    def hook(error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__module__.partition(".")[0] != package:
            show(error)

    return hook


def _saying(package: str, say: Say, show: Callable[..., None]) -> Callable[..., None]:
    """A hook for Python's warnings, which says the first of a package's as a line, and no other."""
    is_said = False

    def hook(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        nonlocal is_said
        if package not in Path(filename).parts:
            show(message, category, filename, *rest)
        elif not is_said:
            is_said = True
            say(f"{package.title()} says: {' '.join(str(message).split())}")

    return hook
