"""Weights & Biases without its server: what a run leaves on disk, and a stand-in that takes what is sent."""

import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from netslim.train.record.wandb_run import WandbRun

KEY = "a" * 40
"""What every test has for a key."""


@contextmanager
def account(home: Path) -> Iterator[Callable[[str], None]]:
    """Give W&B a key, and by what is yielded an address; afterwards it forgets both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WandbRun, "stays_offline", False)
        for name in ("WANDB_MODE", "WANDB_SERVICE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_CONFIG_DIR", str(home))
        patch.setenv("WANDB_DATA_DIR", str(home))
        patch.setenv("WANDB_CACHE_DIR", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        yield lambda url: patch.setenv("WANDB_BASE_URL", url)
        wandb.teardown()


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


def wandb_lines(run: Path) -> list[dict[str, Any]]:
    """What was logged, by line; the parts of a histogram or a picture have names like ``key/_type``."""
    return [
        {"/".join([item.key] if item.key else item.nested_key): json.loads(item.value_json) for item in line.item}
        for line in (record.history for record in wandb_records(run) if record.HasField("history"))
    ]


def wandb_history(run: Path) -> list[dict[str, Any]]:
    """The numbers that were logged, by line."""
    return [
        {key: value for key, value in line.items() if not key.startswith(("_", "gamma/"))} for line in wandb_lines(run)
    ]


def wandb_steps(run: Path) -> list[int]:
    """By what W&B numbers the lines."""
    return [record.history.step.num for record in wandb_records(run) if record.HasField("history")]


def wandb_summary(run: Path) -> dict[str, Any]:
    """The summary's numbers and words at the end."""
    found: dict[str, Any] = {}
    for record in wandb_records(run):
        for item in record.summary.update if record.HasField("summary") else ():
            found["/".join([item.key] if item.key else item.nested_key)] = json.loads(item.value_json)
    return {key: value for key, value in found.items() if not key.startswith(("_", "gamma/"))}


def wandb_config(run: Path) -> dict[str, Any]:
    """The config with which the run began."""
    (start,) = (record.run for record in wandb_records(run) if record.HasField("run"))
    return {item.key: json.loads(item.value_json) for item in start.config.update if item.key != "_wandb"}


class Handler(BaseHTTPRequestHandler):
    """As much of W&B's server as runs, `wandb sync` and workspaces need; ``server`` keeps what they sent."""

    protocol_version = "HTTP/1.1"  # wandb-core sends its requests in chunks
    server: "Server"

    def do_HEAD(self) -> None:
        self._answer({}, self.server.status)

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if not self.server.is_alive.is_set():
            self.server.is_over.wait()
            return
        self.server.keys.add(self.headers["Authorization"])
        if self.path == "/graphql":
            query = json.loads(body)
            self._answer_query(query["query"], query.get("variables") or {})
        else:
            *_, run, _ = self.path.split("/")  # /files/ENTITY/PROJECT/RUN/file_stream
            for name, chunk in json.loads(body or "{}").get("files", {}).items():
                lines = self.server.streams[run, name]
                lines[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
            self._answer({"exitcode": None, "limits": {}})

    def _answer_query(self, query: str, variables: dict[str, Any]) -> None:
        found = re.search(r"(?:query|mutation) (\w+)", query)
        name = found.group(1) if found else ""
        self.server.calls.append((name, variables))
        if name in self.server.refusals:
            status, message = self.server.refusals[name]
            self._answer({"data": {name: None}, "errors": [{"message": message, "path": [name]}]}, status)
        else:
            self._answer({"data": self.server.answers.get(name, lambda _: {})(variables)})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode() if self.command != "HEAD" else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """What was sent to the stand-in."""

    daemon_threads = True

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = status  # the answer to HEAD
        self.is_alive, self.is_over = threading.Event(), threading.Event()
        self.is_alive.set()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.streams: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self.refusals: dict[str, tuple[int, str]] = {}
        """By the name of a query: the status and the words with which it is refused."""
        self.answers = {
            "Viewer": lambda _: {"viewer": {"id": "1", "entity": "someone", "username": "someone", "flags": "{}"}},
            "GetDefaultEntity": lambda _: {"viewer": {"id": "1", "entity": "someone"}},
            "ArtifactType": lambda _: {"project": None},  # there are no artifacts yet
            "UpsertBucket": self._take_run,
            "CreateRunFiles": self._take_files,
            "CreateArtifact": _take_artifact,
            "UseArtifact": lambda variables: {"useArtifact": {"artifact": {"id": variables["input"]["artifactID"]}}},
            "UpsertView2": lambda variables: {
                "upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}
            },
        }

    def handle_error(self, *_: object) -> None:
        """Callers that hang up are no news."""

    def variables(self, name: str) -> list[dict[str, Any]]:
        """What was sent with the queries of this name."""
        return [variables for called, variables in self.calls if called == name]

    def _take_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        name, entity = variables["name"], variables.get("entity") or "someone"
        project = {"id": "1", "name": variables["project"], "entity": {"id": "1", "name": entity}}
        bucket = {"id": "1", "name": name, "displayName": name, "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _take_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        places = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{variables['run']}/{name}"} for name in variables["files"]
        ]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": places}}


def _take_artifact(variables: dict[str, Any]) -> dict[str, Any]:
    name = variables["input"]["artifactCollectionName"]
    sequence = {"latestArtifact": {"id": name}}
    # as if its content were there already, so that nothing is uploaded
    return {"createArtifact": {"artifact": {"id": name, "state": "COMMITTED", "artifactSequence": sequence}}}


@contextmanager
def server(status: int = 200) -> Iterator[Server]:
    """A server that is alive until ``is_alive`` is cleared: from then on it says nothing."""
    found = Server(status)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.is_over.set()
    found.shutdown()
    found.server_close()
