"""What a stage leaves behind: metrics.jsonl, and W&B without questions, and without harm."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from test_train_distributed import Shares, network, new_runtime
from test_train_resume import CrashError, Dying
from torch import nn
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from netslim.train import (
    CheckpointConfig,
    EngineConfig,
    FitConfig,
    Record,
    RecordConfig,
    Saver,
    Store,
    fit,
    wandb_run,
    wandb_server,
)
from netslim.train.wandb_run import WandbRun
from netslim.train.wandb_server import Probe, wandb_mode

METRICS = {"epoch": 1, "train_loss": 0.5, "accuracy": 0.9, "images_per_second": 10.0}
OFFLINE = RecordConfig(wandb="offline")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def epochs(first: int, last: int) -> list[dict[str, Any]]:
    return [{**METRICS, "epoch": epoch, "train_loss": 1 / epoch} for epoch in range(first, last + 1)]


def wandb_runs(directory: Path) -> list[Path]:
    """The directories of W&B runs, the oldest first, and complete."""
    wandb.teardown()  # as at exit: it waits for the process that writes them
    return sorted((directory / "wandb").glob("*run-*-*"), key=lambda path: path.stat().st_mtime_ns)


def wandb_records(run: Path) -> list[WandbRecord]:
    """What W&B left on disk: after 7 bytes, blocks of 32 KiB with pieces of records (LevelDB's log format)."""
    (path,) = run.glob("*.wandb")
    data, at, piece, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 0 < (left_in_block := -at % 32768) < 7:  # too short for a header: padding
            at += left_in_block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(WandbRecord.FromString(piece))
            piece = b""
    return found


def wandb_history(run: Path) -> list[dict[str, Any]]:
    """The numbers that were logged, by line, and the step of each line."""
    found = []
    for record in wandb_records(run):
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found.append({key: value for key, value in items.items() if not key.startswith(("_", "gamma/"))})
            found[-1]["step"] = record.history.step.num
    return found


def with_steps(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**line, "step": line["epoch"]} for line in metrics]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Gives W&B a key, and a server at the address that the test names; afterwards W&B forgets both."""
    monkeypatch.setattr(WandbRun, "stays_offline", False)
    for name in ("WANDB_MODE", "WANDB_SERVICE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "WANDB_API_KEY": "a" * 40,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "home" / "netrc"),
    }.items():
        monkeypatch.setenv(name, value)
    yield lambda url: monkeypatch.setenv("WANDB_BASE_URL", url)
    wandb.teardown()


@contextmanager
def listener(*, reads: bool) -> Iterator[str]:
    """A server that accepts connections, or not even that, and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(128 if reads else 0)
        callers = []
        for _ in range(0 if reads else 4):  # until the queue of those that wait is full
            callers.append(socket.socket())
            callers[-1].setblocking(False)
            with suppress(BlockingIOError):
                callers[-1].connect(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for caller in callers:
            caller.close()


class Handler(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs to start; ``server.status`` is its answer to everything else."""

    def do_HEAD(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if not self.server.is_alive.is_set():  # type: ignore[attr-defined]
            self.server.is_over.wait()  # type: ignore[attr-defined]
            return
        name = query.get("variables", {}).get("name")
        project = {"id": "1", "name": "netslim", "entity": {"id": "1", "name": "someone"}}
        bucket = {"id": "1", "name": name, "displayName": name, "config": "{}", "project": project}
        answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Callers that hang up are no news."""


@contextmanager
def server(status: int = 200) -> Iterator[Any]:
    """A server that is alive until ``is_alive`` is cleared: from then on it says nothing."""
    with Server(("127.0.0.1", 0), Handler) as found:
        found.status, found.is_alive, found.is_over = status, threading.Event(), threading.Event()  # type: ignore[attr-defined]
        found.url = f"http://127.0.0.1:{found.server_port}"  # type: ignore[attr-defined]
        found.is_alive.set()  # type: ignore[attr-defined]
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.is_over.set()  # type: ignore[attr-defined]
        found.shutdown()


def test_every_epoch_is_on_disk_as_soon_as_it_ended(tmp_path: Path) -> None:
    with Record("sparse", tmp_path, is_main=True) as record:
        record.epoch(METRICS, nn.Identity())
        assert lines(tmp_path / "metrics.jsonl") == [METRICS]
        record.epoch({**METRICS, "epoch": 2}, nn.Identity())
        assert [line["epoch"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_stage_that_starts_again_replaces_what_the_first_attempt_left(tmp_path: Path) -> None:
    for _ in range(2):
        with Record("sparse", tmp_path, is_main=True) as record:
            record.epoch(METRICS, nn.Identity())
    assert lines(tmp_path / "metrics.jsonl") == [METRICS]


def test_other_ranks_leave_and_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Record("sparse", tmp_path / "sparse", is_main=False) as record:
        record.epoch(METRICS, nn.Identity())
        record.say("hello")
    assert not (tmp_path / "sparse").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("wanted", "environment", "has_key", "mode"),
    [
        ("auto", None, True, "online"),
        ("auto", None, False, "offline"),
        ("auto", "offline", True, "offline"),
        ("auto", "disabled", True, None),
        ("online", "offline", False, "online"),
        ("offline", None, True, "offline"),
        ("disabled", None, True, None),
    ],
)
def test_the_wandb_mode_is_decided_without_a_prompt(
    wanted: Any, environment: str | None, has_key: bool, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_mode(wanted, has_key=lambda: has_key) == mode


@contextmanager
def no_server(kind: str) -> Iterator[str]:
    if kind == "refuses":
        with socket.socket() as taken:  # bound, so that nobody else answers there, and not listening
            taken.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    else:
        with listener(reads=kind == "accepts and is silent") as url:
            yield url


@pytest.mark.parametrize("kind", ["refuses", "accepts and is silent", "does not accept"])
@pytest.mark.parametrize("wanted", ["online", "auto"])
def test_without_an_answer_everything_is_recorded_offline(
    kind: str,
    wanted: Any,
    tmp_path: Path,
    address: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wandb_server, "PROBE_SECONDS", 0.2)
    modes = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: modes.append(given["mode"]) or init(**given))  # type: ignore[func-returns-value]
    with no_server(kind) as url:
        address(url)
        for stage in ("sparse", "finetune-0.50"):
            with Record(stage, tmp_path / stage, is_main=True, config=RecordConfig(wandb=wanted)) as record:
                for line in epochs(1, 3):
                    record.epoch(line, nn.BatchNorm2d(4))
                record.finish({"accuracy": 0.9})
    assert modes == ["offline", "offline"], "nobody waited for wandb.init"
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning == (
        f"sparse: warning: W&B does not answer at {url}; recording offline, "
        f"upload later with `wandb sync {tmp_path}/wandb/offline-run-*`"
    )
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    for stage, run in zip(("sparse", "finetune-0.50"), wandb_runs(tmp_path), strict=True):
        assert lines(tmp_path / stage / "metrics.jsonl") == epochs(1, 3)
        assert wandb_history(run) == with_steps(epochs(1, 3))
        assert wandb_records(run)[-1].HasField("exit")


def test_online_without_a_key_asks_for_none(
    tmp_path: Path,
    address: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    with server() as there:
        address(there.url)
        with Record("sparse", tmp_path / "sparse", is_main=True, config=RecordConfig(wandb="online")) as record:
            record.epoch(METRICS, nn.Identity())
    assert "W&B finds no key" in capfd.readouterr().err
    (run,) = wandb_runs(tmp_path)
    assert wandb_history(run) == with_steps([METRICS])


@pytest.mark.parametrize("status", [200, 404, 503])
def test_any_status_is_an_answer(status: int, address: Callable[[str], None]) -> None:
    with server(status) as there:
        address(there.url)
        assert Probe().finds_server()


def test_the_server_is_looked_for_through_the_proxy(
    address: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    address("http://no-such-host.invalid")
    with server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert Probe().finds_server()


def train_some_seconds(record: Record) -> None:
    """So long that it is known whether there is a server."""
    assert record._wandb is not None
    if record._wandb._probe is not None:
        record._wandb._probe.join()


def test_a_server_that_falls_silent_keeps_no_run_from_ending(
    tmp_path: Path,
    address: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 1.0)
    with server() as there:
        address(there.url)
        for stage in ("sparse", "finetune-0.50"):
            with Record(stage, tmp_path / stage, is_main=True, config=RecordConfig(wandb="online")) as record:
                train_some_seconds(record)
                record.epoch(METRICS, nn.Identity())
                there.is_alive.clear()
                record.epoch({**METRICS, "epoch": 2}, nn.Identity())
    online, offline = wandb_runs(tmp_path)
    assert online.name.startswith("run-")
    assert offline.name.startswith("offline-run-")
    (warning,) = capfd.readouterr().err.splitlines()
    assert f"`wandb sync --include-online {online}`" in warning
    for run in (online, offline):
        assert [line["epoch"] for line in wandb_history(run)] == [1, 2]


def test_a_server_that_starts_no_run_is_waited_for_once(
    tmp_path: Path,
    address: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 1.0)
    with server() as there:
        address(there.url)
        there.is_alive.clear()
        for stage in ("sparse", "finetune-0.50"):
            with Record(stage, tmp_path / stage, is_main=True, config=RecordConfig(wandb="online")) as record:
                train_some_seconds(record)
                record.epoch(METRICS, nn.Identity())
                assert (tmp_path / "wandb" / "latest-run").readlink().name.endswith(record.wandb_id or "")
    (warning,) = capfd.readouterr().err.splitlines()
    assert "W&B could not start online" in warning
    for run in wandb_runs(tmp_path)[-2:]:
        assert run.name.startswith("offline-run-")
        assert wandb_history(run) == with_steps([METRICS])


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("wandb.init", "start"),
        ("wandb.Run.log", "log"),
        ("wandb.sdk.wandb_summary.Summary.update", "log"),
        ("wandb.Run.finish", "finish"),
    ],
)
def test_what_goes_wrong_with_wandb_is_a_warning(
    name: str,
    does: str,
    tmp_path: Path,
    address: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(name, fail)
        with Record("sparse", tmp_path / "sparse", is_main=True, config=OFFLINE) as record:
            for line in epochs(1, 2):
                record.epoch(line, nn.Identity())
            record.finish({"accuracy": 0.9})
    assert lines(tmp_path / "sparse" / "metrics.jsonl") == epochs(1, 2)
    assert capfd.readouterr().err.splitlines() == [
        f"sparse: warning: W&B could not {does} (No space left on device); this stage goes on without it"
    ]


def test_a_run_that_goes_on_keeps_its_wandb_run_and_has_each_epoch_once(
    tmp_path: Path, address: Callable[[str], None]
) -> None:
    with Record("sparse", tmp_path / "sparse", is_main=True, config=OFFLINE) as record:
        for line in epochs(1, 3):
            record.epoch(line, nn.Identity())
        identity = record.wandb_id
    with Record("sparse", tmp_path / "sparse", is_main=True, config=OFFLINE) as record:
        assert record.wandb_id != identity, "until it resumes"
        record.resume(epochs(1, 2), identity)
        for line in epochs(3, 4):
            record.epoch(line, nn.Identity())
        assert record.wandb_id == identity
    first, second = wandb_runs(tmp_path)
    assert {record.run.run_id for run in (first, second) for record in wandb_records(run)} == {identity, ""}
    assert wandb_history(first) == with_steps(epochs(1, 3))
    assert wandb_history(second) == with_steps(epochs(1, 4)), "whole by itself"
    assert lines(tmp_path / "sparse" / "metrics.jsonl") == epochs(1, 4)


@pytest.mark.parametrize(("is_main", "wanted"), [(True, "disabled"), (False, "offline")])
def test_there_is_no_id_where_there_is_no_wandb(is_main: bool, wanted: Any, tmp_path: Path) -> None:
    with Record("sparse", tmp_path / "sparse", is_main=is_main, config=RecordConfig(wandb=wanted)) as record:
        record.resume(epochs(1, 1), "0123abcd")
        assert record.wandb_id is None
    assert not (tmp_path / "wandb").exists()


def test_a_checkpoint_holds_the_id(
    tmp_path: Path, address: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    found = []
    for batches in (5, 100):  # of four an epoch
        run = new_runtime(EngineConfig())
        saver = Saver(Store(tmp_path / "sparse" / "checkpoints", 2), run, CheckpointConfig())
        images = Dying(run, 4, batches=batches)
        with suppress(CrashError), Record("sparse", tmp_path / "sparse", is_main=True, config=OFFLINE) as record:
            fit(network(), images, Shares(run, 10), FitConfig(epochs=2), run=run, record=record, saver=saver)
        run.close()
        found.append(record.wandb_id)
    assert found[0] == found[1]
    assert [[line["epoch"] for line in wandb_history(run)] for run in wandb_runs(tmp_path)] == [[1], [1, 2]]
