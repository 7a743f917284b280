"""How a process finds W&B: its settings, its key, whether anything answers there, and the sweep it is a trial of."""

import http.client
import os
import ssl
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

PROBE_SECONDS = 5.0
"""How long to look for a server; training goes on meanwhile."""
_SWEEP, _RUN = "WANDB_SWEEP_ID", "WANDB_RUN_ID"
_OF_A_RUN = (
    *(_SWEEP, _RUN, "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_NOTES"),
    *("WANDB_JOB_TYPE", "WANDB_TAGS", "WANDB_DIR", "WANDB_RESUME", "WANDB_MODE"),
)
"""What W&B would take for every run of the process, whatever it is told of each."""
Mode = Literal["online", "offline"]
_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
"""What WANDB_MODE may say, and what W&B calls that now. Not shared: rank 0 records alone."""


def of_environment(name: str) -> str | None:
    """What a variable of W&B's says, without its prefix; None where it says nothing."""
    return os.environ.get(f"WANDB_{name}", "").strip() or None


def mode_of_environment() -> str:
    """The mode that WANDB_MODE says; "auto" where it says none. Raises ValueError for one that there is not here."""
    said = of_environment("MODE")
    if said is None:
        return "auto"
    if said not in _MODES:
        raise ValueError(
            f"WANDB_MODE is {said!r}; netslim takes {', '.join(_MODES)}, of W&B's own modes all but shared; set one of "
            "them, or give --record.wandb, which wins over it"
        )
    return _MODES[said]


@dataclass(frozen=True)
class Trial:
    """What ``wandb agent`` says to the processes it starts: the sweep, and the run that it reads the result from."""

    sweep: str
    run: str
    project: str | None
    entity: str | None

    @classmethod
    def of_this_process(cls) -> "Trial | None":
        """None where no agent started it."""
        sweep, run = os.environ.get(_SWEEP), os.environ.get(_RUN)
        if not sweep or not run:
            return None
        return cls(sweep, run, os.environ.get("WANDB_PROJECT"), os.environ.get("WANDB_ENTITY"))


@cache
def mode_of_files() -> str:
    """The mode that `wandb offline` or `wandb disabled` has left in W&B's settings; "online" where neither has.

    Asked once, before `set_up_wandb` says another to look for a key.
    """
    return str(_settings().mode)


def set_up_wandb() -> Any:
    """W&B's settings, from its files and the environment."""
    mode_of_files()
    # online: under a mode that the configuration overrides, W&B would look for no key
    return _settings(mode="online")


def _settings(**own: Any) -> Any:
    # its telemetry keeps a process from ending for as long as the server does not answer, after offline runs too
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    _give_logs_a_place()
    import wandb  # seconds to import, and not wanted everywhere

    with _without_runs():
        return wandb.setup(wandb.Settings(silent=True, **own)).settings


def _give_logs_a_place() -> None:
    """Name a cache folder where there is no HOME, or none to write to: W&B's process would log to the terminal."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    logs = cache / "wandb" / "logs"
    try:
        if cache.is_absolute():  # else nobody knows a home
            logs.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    is_place = cache.is_absolute() and os.access(logs, os.W_OK)
    if not is_place or "HOME" not in os.environ:
        spare = Path(tempfile.gettempdir(), f"netslim-{os.getuid()}")
        os.environ["XDG_CACHE_HOME"] = str(cache if is_place else spare)


@contextmanager
def _without_runs() -> Iterator[None]:
    """Hide the variables of a run, which are our fields' defaults: else every run of the process has the trial's id."""
    hidden = {name: os.environ.pop(name) for name in _OF_A_RUN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def has_key() -> bool:
    set_up_wandb()
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)  # to verify it would be to wait for the server
    except wandb.errors.AuthenticationError:
        return True  # a malformed one, which wandb.init refuses and says why


def wandb_mode(
    wanted: Literal["auto", "online", "offline", "disabled"],
    has_key: Callable[[], bool] = lambda: False,
    of_files: Callable[[], str] = lambda: "online",
) -> Mode | None:
    """How to record; None is not at all.

    ``auto`` is what WANDB_MODE says, else what W&B's settings do, else online where there is a key.
    """
    wish = mode_of_environment() if wanted == "auto" else wanted
    if wish == "auto" and (left := of_files()) != "online":
        wish = _MODES[left]
    if wish == "disabled":
        return None
    if wish in ("online", "offline"):
        return cast(Mode, wish)
    return "online" if has_key() else "offline"


class Probe(threading.Thread):
    """Asks whether anything answers where W&B's server should be, while the training goes on."""

    def __init__(self) -> None:
        super().__init__(name="wandb-probe", daemon=True)  # no reason for an interpreter to stay
        settings = set_up_wandb()
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
