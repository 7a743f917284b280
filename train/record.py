"""What a stage leaves behind while it runs: metrics.jsonl always, Weights & Biases where wanted."""

import contextlib
import http.client
import json
import os
import secrets
import shlex
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TextIO, TypeVar, cast

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

T = TypeVar("T")

# How long W&B may keep a process waiting. The first wait in vain is the last: what follows is recorded offline.
PROBE_SECONDS, INIT_SECONDS, FINISH_SECONDS = 5.0, 20.0, 20.0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RecordConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online where a key is present, else offline; without an answer, offline."""
    project: str = "netslim"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; None is the key's own."""
    group: str | None = None
    """W&B group that holds the stages of this experiment; None is the name of the run directory."""
    tags: tuple[str, ...] = ()
    """W&B tags."""


class Record:
    """The record of one stage, kept by rank 0; on the other ranks every method does nothing. Use it with ``with``.

    ``directory`` gets ``metrics.jsonl``, a line an epoch, flushed at once. Progress bars show on a terminal only.
    W&B starts with the first `epoch` or `finish`; what goes wrong with it is a warning line, and never an exception.
    """

    def __init__(
        self,
        stage: str,
        directory: Path,
        *,
        is_main: bool,
        config: RecordConfig | None = None,
        run_name: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.stage = stage
        self.is_main = is_main
        self._shows_bars = is_main and sys.stderr.isatty()
        self._path = directory / "metrics.jsonl"
        self._file: TextIO | None = None
        self._wandb: _Wandb | None = None
        if is_main:
            directory.mkdir(parents=True, exist_ok=True)
            if config is not None and _wandb_mode(config) is not None:
                self._wandb = _Wandb(config, stage, run_name, directory.parent, settings or {}, self.say)

    @property
    def wandb_id(self) -> str | None:
        """The id of this stage's W&B run, for `resume`; None without W&B, and on the other ranks."""
        return self._wandb.id if self._wandb is not None else None

    def say(self, line: str, *, warning: bool = False) -> None:
        """Print one line, from rank 0; a warning goes to stderr."""
        if self.is_main:
            stream = sys.stderr if warning else sys.stdout
            tqdm.write(f"{self.stage}: {'warning: ' if warning else ''}{line}", file=stream)
            stream.flush()

    def progress(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """The items behind a progress bar, where one shows."""
        return tqdm(items, total=total, desc=f"{self.stage} {what}", leave=False, disable=not self._shows_bars)

    def resume(self, metrics: Sequence[dict[str, Any]], wandb_id: str | None = None) -> None:
        """Go on where an earlier process was: with its epochs' ``metrics``, and in its W&B run.

        Lines that it wrote to ``metrics.jsonl`` beyond these epochs go.
        """
        if self.is_main:
            self._file = self._path.open("w", encoding="utf-8")
            self._file.writelines(json.dumps(line) + "\n" for line in metrics)
            self._file.flush()
        if self._wandb is not None:
            self._wandb.resume(metrics, wandb_id)

    def epoch(self, metrics: dict[str, Any], model: nn.Module) -> None:
        """Append one epoch's metrics; W&B also gets a histogram of |gamma| per BatchNorm."""
        if not self.is_main:
            return
        if self._file is None:  # of the first epoch: what an earlier attempt left is replaced
            self._file = self._path.open("w", encoding="utf-8")
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        self.say(
            f"epoch {metrics['epoch']}  loss {metrics['train_loss']:.3f}  accuracy {metrics['accuracy']:.4f}  "
            f"{metrics['images_per_second']:.0f} images/s"
        )
        if self._wandb is not None:
            self._wandb.log(metrics, model)

    def finish(self, summary: dict[str, Any]) -> None:
        """Make ``summary`` the W&B run's summary."""
        if self._wandb is not None:
            self._wandb.summarise(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        if self._file is not None:
            # after a failed write the rest can't be written either, and the first error is the one to report
            with contextlib.suppress(*([] if kind is None else [OSError])):
                self._file.close()


class _Wandb:
    """The W&B run of one stage, which can cost the training neither its life nor more than seconds.

    A server that does not answer is noticed while the first epochs run; one that stops answering, by a limit on every
    wait. What W&B would show is on disk in each case, for `wandb sync`.
    """

    stays_offline: ClassVar[bool] = False
    """Whether this process has waited for W&B in vain: no stage after that waits again."""

    def __init__(
        self,
        config: RecordConfig,
        stage: str,
        run_name: str,
        directory: Path,
        settings: dict[str, Any],
        say: Callable[..., None],
    ) -> None:
        self.id = secrets.token_hex(4)  # not from `random`: two runs with one seed would share it
        self._description: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group or run_name,
            "job_type": stage.split("-")[0],
            "name": f"{run_name} {stage}",
            "tags": list(config.tags),
            "config": settings,
            "dir": directory,
        }
        self._say = say
        self._run: Any = None
        self._is_out = False
        self._is_resumed = False
        self._earlier: list[dict[str, Any]] = []
        """Epochs of earlier processes."""
        self._waiting: list[dict[str, Any]] = []
        """Epochs that ended before it was known whether there is a server."""
        self._probe: _Probe | None = None
        self._mode = self._attempt("start", lambda: _wandb_mode(config, _has_key))
        if self._mode == "online" and not _Wandb.stays_offline:
            self._probe = self._attempt("start", _Probe)

    def resume(self, metrics: Sequence[dict[str, Any]], run_id: str | None) -> None:
        self._earlier = list(metrics)
        if run_id is not None:  # else W&B was disabled until now
            self.id, self._is_resumed = run_id, True

    def log(self, metrics: dict[str, Any], model: nn.Module) -> None:
        line = self._attempt("log", lambda: {**metrics, **_gamma_histograms(model)})
        if self._run is None and self._probe is not None and self._probe.is_alive():
            self._waiting.append(line)  # the training does not wait for the answer, only the end of the stage does
            return
        self._start()
        self._attempt("log", lambda: _log(self._run, line))

    def summarise(self, summary: dict[str, Any]) -> None:
        self._start()
        self._attempt("log", lambda: self._run.summary.update(summary))

    def finish(self, exit_code: int) -> None:
        if self._waiting:
            self._start()
        if self._run is not None:
            self._attempt("finish", lambda: self._finish(exit_code))

    def _attempt(self, what: str, act: Callable[[], Any]) -> Any:
        """The result of ``act``. Where it raises: a warning, and no more W&B in this stage."""
        if self._is_out:
            return None
        try:
            return act()
        except Exception as error:
            self._is_out = True
            self._say(f"W&B could not {what} ({_first_line(error)}); this stage goes on without it", warning=True)
            return None

    def _start(self) -> None:
        if self._run is None:
            self._run = self._attempt("start", self._open)

    def _finish(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            _Wandb.stays_offline = True
            self._say(
                f"W&B took too long for the rest of the record, upload it later with `wandb sync --include-online "
                f"{_directory(self._run)}`; stages after this one record offline ({_remedy(self._run)})",
                warning=True,
            )

    def _open(self) -> Any:
        _set_up_wandb()
        import wandb

        run, trouble = None, None
        if self._mode == "online" and not _Wandb.stays_offline:
            trouble = self._why_not_online()
            if trouble is None:
                try:
                    run = self._init("online")
                except wandb.errors.Error as error:
                    trouble = f"W&B could not start online ({_first_line(error)})"
                    self.id = secrets.token_hex(4)  # W&B holds the other one until the process ends
        _Wandb.stays_offline |= trouble is not None
        if run is None:
            run = self._init("offline")
        if trouble is not None:
            self._say(f"{trouble}; recording offline, upload later with {_remedy(run)}", warning=True)
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        for line in (*self._earlier, *self._waiting):
            _log(run, line)
        self._waiting.clear()
        return run

    def _why_not_online(self) -> str | None:
        if not _has_key():  # wandb.init would ask for one
            return "W&B finds no key (set one by `wandb login`)"
        if self._probe is not None and not self._probe.finds_server():
            return f"W&B does not answer at {self._probe.url}"
        return None

    def _init(self, mode: Literal["online", "offline"]) -> Any:
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
            ),
        )


class _Probe(threading.Thread):
    """Asks whether anything answers where W&B's server should be, while the training goes on."""

    def __init__(self) -> None:
        super().__init__(name="wandb-probe", daemon=True)  # no reason for an interpreter to stay
        settings = _set_up_wandb()
        self.url: str = settings.base_url
        own = {"http": settings.http_proxy, "https": settings.https_proxy}
        proxies = urllib.request.getproxies() | {scheme: proxy for scheme, proxy in own.items() if proxy}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        self._has_answer = False
        self.start()

    def run(self) -> None:
        try:
            self._opener.open(urllib.request.Request(self.url, method="HEAD"), timeout=PROBE_SECONDS).close()
            self._has_answer = True
        except urllib.error.HTTPError as error:  # any status is an answer
            error.close()
            self._has_answer = True
        except urllib.error.URLError as error:
            # W&B may know certificates that Python does not
            self._has_answer = isinstance(error.reason, ssl.SSLCertVerificationError)
        except (OSError, http.client.HTTPException):
            pass

    def finds_server(self) -> bool:
        self.join(PROBE_SECONDS)  # the timeout above is none for finding the server's address
        return self._has_answer


def _wandb_mode(
    config: RecordConfig, has_key: Callable[[], bool] = lambda: False
) -> Literal["online", "offline"] | None:
    wanted = os.environ.get("WANDB_MODE", "auto") if config.wandb == "auto" else config.wandb
    if wanted == "disabled":
        return None
    if wanted in ("online", "offline"):
        return cast(Literal["online", "offline"], wanted)
    return "online" if has_key() else "offline"


def _has_key() -> bool:
    _set_up_wandb()
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)  # to verify it would be to wait for the server
    except wandb.errors.AuthenticationError:
        return True  # a malformed one, which wandb.init refuses and says why


def _set_up_wandb() -> Any:
    """W&B's settings, from its files and the environment."""
    # its telemetry keeps a process from ending for as long as the server does not answer, after offline runs too
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # seconds to import, and not wanted everywhere

    # online: under a WANDB_MODE that the configuration overrides, W&B would look for no key
    return wandb.setup(wandb.Settings(silent=True, mode="online")).settings


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


@torch.no_grad()
def _gamma_histograms(model: nn.Module) -> dict[str, Any]:
    import numpy
    import wandb

    return {
        f"gamma/{name}": wandb.Histogram(np_histogram=numpy.histogram(module.weight.abs().float().cpu(), bins=64))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    }
