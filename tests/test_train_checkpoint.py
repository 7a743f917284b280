"""Whatever happens to a checkpoint, one that is whole is found, or the reason why there is none is said."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from netslim.train.saved import checkpoint
from netslim.train.saved.checkpoint import Snapshot, Store, read

NAMES = ("tensors.safetensors", "values.json", "manifest.json")


def snapshot(step: int) -> Snapshot:
    tensors = {"model/weight": torch.full((4, 3), float(step)), "rng/0": torch.arange(20, dtype=torch.uint8)}
    return Snapshot(step, tensors, {"epoch": step // 10, "metrics": [{"loss": 0.1}]})


def assert_is(found: Snapshot | None, step: int) -> None:
    want = snapshot(step)
    assert found is not None
    assert (found.step, dict(found.values)) == (step, dict(want.values))
    assert found.tensors.keys() == want.tensors.keys()
    assert all(torch.equal(found.tensors[name], want.tensors[name]) for name in want.tensors)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")


def newest(store: Store) -> tuple[Snapshot | None, list[str]]:
    said: list[str] = []
    return store.newest(said.append), said


def test_without_a_checkpoint_there_is_none(store: Store) -> None:
    assert newest(store) == (None, [])


def test_the_newest_checkpoint_is_read_as_it_was_saved(store: Store) -> None:
    for step in (9, 10, 11):
        store.save(snapshot(step))
    found, said = newest(store)
    assert_is(found, 11)
    assert not said


def test_the_newest_and_the_best_are_kept(store: Store) -> None:
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20), (50, 20)):
        store.save(snapshot(step), best_step=best)
    assert sorted(path.name for path in store.directory.iterdir()) == [
        "step-00000020",
        "step-00000040",
        "step-00000050",
    ]


def test_a_step_that_is_saved_again_is_replaced(store: Store) -> None:
    store.save(snapshot(10))
    store.save(Snapshot(10, {}, {}))
    assert read(store.directory / "step-00000010").values == {}


def test_200_truncations_and_bit_flips_are_found_and_the_checkpoint_before_is_used(store: Store) -> None:
    store.save(snapshot(10))
    store.save(snapshot(20))
    whole = store.directory / "step-00000020"
    copy = store.directory.parent / "whole"
    shutil.copytree(whole, copy)
    draw = random.Random(0)
    for _ in range(200):
        shutil.rmtree(whole)
        shutil.copytree(copy, whole)
        file = whole / draw.choice(NAMES)
        content = bytearray(file.read_bytes())
        place = draw.randrange(len(content))
        if draw.random() < 0.5:
            content = content[:place]
        else:
            content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        found, said = newest(store)
        assert_is(found, 10)
        assert len(said) == 1
        assert "step-00000020" in said[0]
        assert "\n" not in said[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_is_named(store: Store, name: str) -> None:
    store.save(snapshot(10))
    store.save(snapshot(20))
    (store.directory / "step-00000020" / name).unlink()
    found, (line,) = newest(store)
    assert_is(found, 10)
    assert f"{name}: No such file" in line


def test_where_no_checkpoint_can_be_used_nothing_is_started_anew(store: Store) -> None:
    (store.save(snapshot(10)) / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* can be used; delete the directory"):
        newest(store)


def test_a_checkpoint_of_a_newer_format_is_refused(store: Store) -> None:
    path = store.save(snapshot(10))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this netslim reads 1"):
        read(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed_or_followed(store: Store, tmp_path: Path) -> None:
    path = store.save(snapshot(10))
    manifest = json.loads((path / "manifest.json").read_text())
    marker, outside = tmp_path / "marker", tmp_path / "outside"
    outside.write_bytes((path / "values.json").read_bytes())
    crafted: list[tuple[str, bytes]] = [(name, pickle.dumps(Bomb(marker))) for name in NAMES]
    huge = (1 << 62).to_bytes(8, "little") + b"{}"
    crafted += [("tensors.safetensors", huge), ("manifest.json", b"[" * 100_000), ("manifest.json", b" " * (2 << 20))]
    named = {"../../outside": manifest["files"]["values.json"]}
    crafted.append(("manifest.json", json.dumps({"format": 1, "files": named}).encode()))
    for name, content in crafted:
        victim = tmp_path / "victim"
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(path, victim)
        (victim / name).write_bytes(content)
        if name != "manifest.json":  # with fitting hashes: only the reader of the content can refuse it
            size, digest = len(content), checkpoint.hashlib.sha256(content).hexdigest()
            files = {**manifest["files"], name: {"bytes": size, "sha256": digest}}
            (victim / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
        with pytest.raises(ValueError, match="is damaged"):
            read(victim)
    assert not marker.exists()


class Crash(BaseException):
    """A process that ends here, without cleaning up."""


OPERATIONS = {
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "write": (Path, "open"),
    "mkdir": (Path, "mkdir"),
}


def count_and_fail(monkeypatch: pytest.MonkeyPatch, kind: str, at: int, error: BaseException) -> Callable[[], int]:
    owner, name = OPERATIONS[kind]
    real, calls = getattr(owner, name), 0

    def operation(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(owner, name, operation)
    return lambda: calls


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=["error", "crash"])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_failure_at_any_operation_of_a_save_leaves_a_checkpoint_that_loads(
    kind: str, error: BaseException, tmp_path: Path
) -> None:
    at, tried = 0, 0
    while True:
        at += 1
        store = Store(tmp_path / str(at), keep=1)
        store.save(snapshot(10))
        with pytest.MonkeyPatch.context() as patch:
            calls = count_and_fail(patch, kind, at, error)
            if isinstance(error, Crash):  # a dead process tidies nothing
                patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)
            try:
                store.save(snapshot(20))
            except (OSError, Crash):
                tried += 1
            else:
                assert calls() < at
                break
        found, said = newest(store)
        assert found is not None
        assert_is(found, found.step)
        assert not said
        store.sweep()
        assert all(path.name.startswith("step-") for path in store.directory.iterdir())
        store.save(snapshot(30))
        assert_is(newest(store)[0], 30)
    assert tried


def test_the_best_is_not_given_up_for_one_that_does_not_verify(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(snapshot(10), best_step=10)
    store.save(snapshot(20), best_step=10)
    store.save(snapshot(30), best_step=10)
    real = checkpoint.write_flushed

    def damaged(path: Path, content: bytes) -> None:
        real(path, content[:-1] if path.name == "tensors.safetensors" else content)

    monkeypatch.setattr(checkpoint, "write_flushed", damaged)
    with pytest.raises(ValueError, match="is damaged"):
        store.save(snapshot(40), best_step=40)
    assert_is(read(store.directory / "step-00000010"), 10)


def test_a_full_disk_leaves_what_was_there(full_disk: Path) -> None:
    store = Store(full_disk / "checkpoints")
    store.save(snapshot(10))
    large = Snapshot(20, {"x": torch.zeros(1 << 22)}, {})
    with pytest.raises(OSError, match="No space left"):
        store.save(large)
    assert_is(newest(store)[0], 10)
    assert [path.name for path in store.directory.iterdir()] == ["step-00000010"]
