"""What a stage leaves behind: metrics.jsonl, and W&B without questions, and without harm."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import wandb
from click.testing import CliRunner
from stand_in import account, server, wandb_history, wandb_records, wandb_runs, wandb_steps, wandb_summary
from test_train_distributed import Shares, network, new_runtime
from test_train_resume import CrashError, Dying
from torch import nn
from wandb.cli import cli

from netslim.train import CheckpointConfig, EngineConfig, FitConfig, Record, RecordConfig, Saver, Store, fit
from netslim.train.record import wandb_run, wandb_server
from netslim.train.record.wandb_content import Artefact, Lineage
from netslim.train.record.wandb_server import Probe, mode_of_files, wandb_mode

METRICS = {"epoch": 1, "train_loss": 0.5, "accuracy": 0.9, "images_per_second": 10.0}
OFFLINE = RecordConfig(wandb="offline")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def epochs(first: int, last: int) -> list[dict[str, Any]]:
    return [{**METRICS, "epoch": epoch, "train_loss": 1 / epoch} for epoch in range(first, last + 1)]


def assert_logged(run: Path, metrics: list[dict[str, Any]]) -> None:
    """The run holds these epochs, each once, numbered by the epoch."""
    assert wandb_history(run) == metrics
    assert wandb_steps(run) == [line["epoch"] for line in metrics]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Gives W&B a key, and a server at the address that the test names; afterwards W&B forgets both."""
    with account(tmp_path / "home") as set_address:
        yield set_address


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
        ("auto", "dryrun", True, "offline"),
        ("auto", "run", False, "online"),
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


@pytest.mark.parametrize("mode", ["ofline", "shared", "Offline"])
def test_a_mode_that_wandb_or_netslim_does_not_have_is_refused_before_anything_starts(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(
        ValueError, match=f"WANDB_MODE is '{mode}'; netslim takes online, offline, disabled, run, dryrun"
    ):
        RecordConfig()
    assert RecordConfig(wandb="offline").wandb == "offline"


def test_what_wandbs_own_commands_left_in_its_settings_is_taken(
    tmp_path: Path, address: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    mode_of_files.cache_clear()
    for command, mode in ((cli.offline, "offline"), (cli.disabled, None)):
        assert CliRunner().invoke(command).exit_code == 0  # `wandb offline`, `wandb disabled`
        wandb.teardown()
        mode_of_files.cache_clear()
        assert wandb_mode("auto", lambda: True, mode_of_files) == mode
    with Record("sparse", tmp_path / "run" / "sparse", is_main=True, config=RecordConfig(wandb="auto")) as record:
        record.epoch(METRICS, nn.Identity())
        assert record.wandb_id is None
    mode_of_files.cache_clear()
    assert not (tmp_path / "run" / "wandb").exists()


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
        assert_logged(run, epochs(1, 3))
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
    assert_logged(run, [METRICS])


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
        assert_logged(run, [METRICS])


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


LINEAGE = Lineage(
    made=Artefact(name="run-sparse", kind="model", about={"stage": "sparse"}),
    used=(Artefact(name="dataset-digits", kind="dataset", about={"source": "digits"}),),
)


def test_pictures_and_artifacts_that_fail_cost_the_record_nothing_else(
    tmp_path: Path, address: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> bytes:
        raise OSError("No space left on device")

    with Record("sparse", tmp_path / "sparse", is_main=True, config=OFFLINE) as record:
        record.epoch(METRICS, nn.Identity())
        record.finish({"accuracy": 0.9}, pictures={"gamma_density": fail}, lineage=LINEAGE)
    (run,) = wandb_runs(tmp_path)
    assert wandb_summary(run)["accuracy"] == 0.9
    assert wandb_records(run)[-1].HasField("exit")
    assert capfd.readouterr().err.splitlines() == [
        "sparse: warning: W&B could not log gamma_density, artifacts (No space left on device); the rest is recorded"
    ]


def test_nothing_is_drawn_without_wandb(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise AssertionError("nobody will see it")

    for config, is_main in ((RecordConfig(wandb="disabled"), True), (OFFLINE, False)):
        with Record("sparse", tmp_path / "sparse", is_main=is_main, config=config) as record:
            record.finish({"accuracy": 0.9}, pictures={"gamma_density": fail}, lineage=LINEAGE)
    assert not (tmp_path / "wandb").exists()


def test_artifacts_keep_no_stage_from_ending_where_the_server_falls_silent(
    tmp_path: Path,
    address: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wandb_run, "EXTRA_SECONDS", 1.0)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 1.0)
    with server() as there:
        address(there.url)
        with Record("sparse", tmp_path / "sparse", is_main=True, config=RecordConfig(wandb="online")) as record:
            train_some_seconds(record)
            record.epoch(METRICS, nn.Identity())
            there.is_alive.clear()
            started = time.monotonic()
            record.finish({"accuracy": 0.9}, lineage=LINEAGE)
        assert time.monotonic() - started < 10
    first, second = capfd.readouterr().err.splitlines()
    assert first == "sparse: warning: W&B could not log artifacts (no answer in 1 s); the rest is recorded"
    assert "W&B took too long for the rest of the record" in second


def test_online_the_server_learns_what_a_stage_was_made_from(tmp_path: Path, address: Callable[[str], None]) -> None:
    with server() as there:
        address(there.url)
        with Record("sparse", tmp_path / "sparse", is_main=True, config=RecordConfig(wandb="online")) as record:
            train_some_seconds(record)
            record.finish({"accuracy": 0.9}, lineage=LINEAGE)
            identity = record.wandb_id
    made = {sent["input"]["artifactCollectionName"] for sent in there.variables("CreateArtifact")}
    assert made == {"dataset-digits", "run-sparse"}
    (used,) = [sent["input"] for sent in there.variables("UseArtifact")]
    assert (used["artifactID"], used["runName"]) == ("dataset-digits", identity)


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
    assert_logged(first, epochs(1, 3))
    assert_logged(second, epochs(1, 4))
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
