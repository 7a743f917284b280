"""The run of one stage in a tracker beside W&B, which can cost the training neither its life nor more than seconds."""

import contextlib
import importlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from netslim.base import replace_all
from netslim.train.record.trackers import TITLES, About, Opened, TrackerName, open_tracker
from netslim.train.record.worker import Worker

WAIT_SECONDS = 20.0
"""How long a tracker may keep a stage waiting: then the stage goes on without it."""
_FILE = "trackers.json"
"""In a stage's directory: by which name each tracker finds the stage's run again."""


class TrackerRun:
    """What one stage leaves in a tracker: every epoch's figures, and its summary at the last epoch.

    It starts with the first of them. A stage that is taken up again goes on in the same run, which is then given the
    epochs that it does not have, those of earlier processes too.
    """

    def __init__(self, name: TrackerName, about: About, say: Callable[..., None]) -> None:
        self._name, self._about, self._say = name, about, say
        self._worker: Worker | None = None
        self._opened: Opened | None = None
        self._is_out = False
        self._earlier: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        """The newest epoch's."""

    def resume(self, metrics: Sequence[dict[str, Any]]) -> None:
        """Go on after the epochs of these metrics."""
        self._earlier = list(metrics)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One epoch's metrics."""
        self._start()
        self._attempt("log", lambda: self._send_epoch(metrics))

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """The stage's last words, of which a figure that the last epoch has already is not repeated."""
        self._start()
        known, step = figures(self._last), int(self._last.get("epoch", 0))
        new = {key: value for key, value in figures(summary).items() if known.get(key) != value}
        self._attempt("log", lambda: self._send(new, step))

    def finish(self, *, failed: bool) -> None:
        """Let the tracker write the rest."""
        opened, worker = self._opened, self._worker
        if opened is not None:
            if failed:
                self._attempt("finish", opened.fail)
            self._attempt("finish", opened.tracker.finish)
            opened.release()
        if worker is not None:
            worker.close()

    def _start(self) -> None:
        if self._worker is None:
            self._worker = Worker(f"netslim-{self._name}")
            self._attempt("start", lambda: importlib.import_module(self._name), is_work=True)
            self._attempt("start", self._open)

    def _open(self) -> None:
        path = self._about.directory / _FILE
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._opened = open_tracker(self._name, self._about, known.get(self._name), self._warn)
        identity = self._opened.identity
        if identity != known.get(self._name):
            replace_all(path.parent, {path.name: json.dumps({**known, self._name: identity}, indent=2).encode()})
        for line in self._earlier:
            self._send_epoch(line)

    def _send_epoch(self, metrics: Mapping[str, Any]) -> None:
        assert self._opened is not None, "it was started"
        self._last = dict(metrics)
        if metrics["epoch"] > self._opened.last_epoch:
            self._send(figures(metrics), metrics["epoch"])

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        assert self._opened is not None, "it was started"
        renamed = self._opened.renamed
        self._opened.tracker.log({renamed.get(key, key): value for key, value in values.items()}, step=step)

    def _attempt(self, what: str, act: Callable[[], object], *, is_work: bool = False) -> None:
        """Do it, in time; where it fails: a warning, and no more of this tracker in this stage.

        What ``is_work`` and no waiting takes as long as it takes on a busy machine.
        """
        if self._is_out or self._worker is None:
            return
        try:
            with _quiet():
                self._worker.do(act, None if is_work else WAIT_SECONDS)
        except Exception as error:
            self._is_out = True
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._warn(f"{TITLES[self._name]} could not {what} ({reason}); this stage goes on without it")

    def _warn(self, line: str) -> None:
        self._say(line, warning=True)


def figures(values: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers among them; those of a mapping by names with dots, as W&B has them."""
    found: dict[str, int | float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": each for key, each in figures(value).items()}
        elif isinstance(value, int | float):
            found[name] = value
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what trackers print and log from the terminal, while this thread waits for one."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
