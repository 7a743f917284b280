"""The Weights & Biases run of one stage, which can cost the training neither its life nor more than seconds."""

import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from netslim.train.record.wandb_content import (
    Lineage,
    Picture,
    Table,
    as_drafts,
    as_image,
    as_table,
    gamma_histograms,
    log_drafts,
)
from netslim.train.record.wandb_server import (
    Mode,
    Probe,
    Trial,
    has_key,
    mode_of_files,
    of_environment,
    set_up_wandb,
    wandb_mode,
)
from netslim.train.record.worker import Worker

# How long W&B may keep a process waiting: as a stage begins to record, for its pictures and artifacts, and at its end.
# The first wait in vain is the last: what follows is recorded offline.
INIT_SECONDS, EXTRA_SECONDS, FINISH_SECONDS = 20.0, 5.0, 15.0
_IGNORED = {
    "RESUME": "a stage goes on in the W&B run that its checkpoint names",
    "CONSOLE": "what a run prints stays here",
}
"""Variables of W&B's for which there is no field, and why."""


class WandbRun:
    """What one stage leaves in W&B.

    A server that does not answer is noticed while the first epochs run; one that stops answering, by a limit on every
    wait. What W&B would show is on disk in each case, for `wandb sync`.

    The stage that ``is_last`` is the run of WANDB_RUN_ID, in a process that ``wandb agent`` started the trial's. Every
    other stage has one of its own beside it, which belongs to no sweep.
    """

    stays_offline: ClassVar[bool] = False
    """Whether this process has waited for W&B in vain: no stage after that waits again."""

    told: ClassVar[set[str]] = set()
    """What this process has said of W&B's variables: each once, and not in every stage."""

    def __init__(
        self,
        *,
        wanted: Any,
        project: str,
        entity: str | None,
        directory: Path,
        description: Mapping[str, Any],
        is_last: bool,
        say: Callable[..., None],
    ) -> None:
        trial = Trial.of_this_process()
        self._say = say
        if trial is not None:  # the agent's wishes come first: the sweep sees no other project
            for name, own, theirs in (("project", project, trial.project), ("entity", entity, trial.entity)):
                if theirs and theirs != own:
                    self._tell_once(
                        f"record.{name} {own} is not taken: the sweep that this is a trial of is in {theirs}"
                    )
            project, entity = trial.project or project, trial.entity or entity
        self._trial = trial if is_last else None
        # not from `random`: two runs with one seed would share it
        self.id = (of_environment("RUN_ID") if is_last else None) or secrets.token_hex(4)
        self._project, self._entity = project, entity
        self._description: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "dir": directory,
            **description,
        }
        for name, why in _IGNORED.items():
            if of_environment(name) not in (None, "off"):
                self._tell_once(f"WANDB_{name} is ignored: {why}")
        self._run: Any = None
        self._is_out = False
        self._is_resumed = False
        self._earlier: list[dict[str, Any]] = []
        """Epochs of earlier processes."""
        self._waiting: list[dict[str, Any]] = []
        """Epochs that ended before it was known whether there is a server."""
        self._probe: Probe | None = None
        self._mode: Mode | None = self._attempt("start", lambda: wandb_mode(wanted, has_key, mode_of_files))
        self.is_wanted = self._mode is not None or self._is_out
        """False where W&B's settings disable it."""
        if self._mode == "online" and not WandbRun.stays_offline:
            self._probe = self._attempt("start", Probe)

    def _tell_once(self, line: str) -> None:
        if line not in WandbRun.told:
            WandbRun.told.add(line)
            self._say(line, warning=True)

    def resume(self, metrics: Sequence[dict[str, Any]], run_id: str | None) -> None:
        """Go on in the run of an earlier process, which saw the epochs of these metrics."""
        self._earlier = list(metrics)
        if run_id is not None:  # else W&B was disabled until now
            self.id, self._is_resumed = run_id, True

    def log(self, metrics: dict[str, Any], model: nn.Module) -> None:
        """One epoch's metrics, and a histogram of |gamma| per BatchNorm."""
        line = self._attempt("log", lambda: {**metrics, **gamma_histograms(model)})
        if self._run is None and self._probe is not None and self._probe.is_alive():
            self._waiting.append(line)  # the training does not wait for the answer, only the end of the stage does
            return
        self._start()
        self._attempt("log", lambda: _log(self._run, line))

    def conclude(
        self,
        summary: Mapping[str, Any],
        tables: Mapping[str, Table],
        pictures: Mapping[str, Picture],
        lineage: Lineage | None,
    ) -> None:
        """The stage's last words."""
        self._start()
        self._attempt("log", lambda: self._run.summary.update(dict(summary)))
        extras = [*tables, *pictures, *(["artifacts"] if lineage else [])]
        if extras:
            what = f"log {', '.join(extras)}"
            self._attempt(what, lambda: self._log_extras(tables, pictures, lineage), is_extra=True)

    def finish(self, exit_code: int) -> None:
        """Let W&B send the rest, for as long as it may take."""
        if self._waiting:
            self._start()
        if self._run is not None:
            self._attempt("finish", lambda: self._finish(exit_code))

    def _attempt(self, what: str, act: Callable[[], Any], *, is_extra: bool = False) -> Any:
        """The result of ``act``. Where it raises: a warning, and, but for extras, no more W&B in this stage."""
        if self._is_out:
            return None
        try:
            return act()
        except Exception as error:
            self._is_out = not is_extra
            rest = "the rest is recorded" if is_extra else "this stage goes on without it"
            self._say(f"W&B could not {what} ({_first_line(error)}); {rest}", warning=True)
            return None

    def _log_extras(
        self, tables: Mapping[str, Table], pictures: Mapping[str, Picture], lineage: Lineage | None
    ) -> None:
        shown = {name: as_table(rows) for name, rows in tables.items()}
        shown |= {name: as_image(draw) for name, draw in pictures.items()}
        used, made = as_drafts(lineage) if lineage is not None else ([], None)

        def log() -> None:
            if shown:
                self._run.log(shown)
            if made is not None:
                log_drafts(self._run, used, made)

        # online W&B asks the server about artifacts
        with Worker("wandb-extras") as worker:
            worker.do(log, EXTRA_SECONDS)

    def _start(self) -> None:
        if self._run is None:
            self._run = self._attempt("start", self._open)

    def _finish(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            WandbRun.stays_offline = True
            self._say(
                f"W&B took too long for the rest of the record, upload it later with `wandb sync --include-online "
                f"{_directory(self._run)}`; stages after this one record offline ({_remedy(self._run)})",
                warning=True,
            )

    def _open(self) -> Any:
        set_up_wandb()
        import wandb

        Path(self._description["dir"]).mkdir(parents=True, exist_ok=True)
        run, trouble = None, None
        if self._mode == "online" and not WandbRun.stays_offline:
            trouble = self._why_not_online()
            if trouble is None:
                try:
                    run = self._init("online")
                except wandb.errors.Error as error:
                    trouble = self._refused(_first_line(error))
                    self.id = secrets.token_hex(4)  # W&B holds the other one until the process ends
        WandbRun.stays_offline |= trouble is not None
        if run is None:
            run = self._init("offline")
        if trouble is not None:
            self._say(f"{trouble}; recording offline, upload later with {_remedy(run)}", warning=True)
        run.define_metric("epoch")
        # No `summary="max"` for accuracy: it would make the summary's number an object in the stages that train, and
        # not in the others. The best figures have names of their own, whose last value is the best.
        run.define_metric("*", step_metric="epoch")
        for line in (*self._earlier, *self._waiting):
            _log(run, line)
        self._waiting.clear()
        return run

    def _why_not_online(self) -> str | None:
        if not has_key():  # wandb.init would ask for one
            return "W&B finds no key (set one by `wandb login`)"
        if self._probe is not None and not self._probe.finds_server():
            return f"W&B does not answer at {self._probe.url}"
        return None

    def _refused(self, reason: str) -> str:
        """That no run came to be where it should have, and what to do if that place is another's."""
        if self._entity is None:
            return f"W&B could not start online in project {self._project} ({reason})"
        return (
            f"W&B could not start online in {self._entity}/{self._project} ({reason}); where your key may not write, "
            "name another --record.entity, and for what is recorded now `wandb sync --entity`"
        )

    def _init(self, mode: Mode) -> Any:
        import wandb

        return wandb.init(
            **self._description,
            id=self.id,
            mode=mode,
            # Offline the run holds all epochs, those of earlier processes too: `wandb sync` replaces what the server
            # has of it. With "allow" it would append them.
            resume="allow" if self._is_resumed and mode == "online" else None,
            reinit="create_new",  # to finish a run that its own stage could not finish would take as long again
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
                sweep_id=None if self._trial is None else self._trial.sweep,
            ),
        )


def _log(run: Any, metrics: dict[str, Any]) -> None:
    # Numbered by the epoch: one that the server has from before a restart is dropped. Committed: the line would else
    # wait in memory for the next.
    run.log(metrics, step=metrics["epoch"], commit=True)


def _directory(run: Any) -> str:
    return shlex.quote(str(Path(run.dir).parent))


def _remedy(run: Any) -> str:
    """The command that uploads this offline run and those beside it."""
    return f"`wandb sync {shlex.quote(str(Path(run.dir).parent.parent))}/offline-run-*`"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
