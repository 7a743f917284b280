"""Crafted files under every name that netslim reads: refused in one line, nothing run, nothing written elsewhere."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_launch_cli import assert_one_line
from test_launch_resume import flags, stopped
from test_prune_origin import Malicious

from netslim.data import DataConfig, Shard, open_loaders, prepare
from netslim.launch.cli import dispatch
from netslim.launch.config import RunConfig
from netslim.launch.export import read_slimmed
from netslim.launch.mistakes import MISTAKE, guarded
from netslim.launch.presets import digits
from netslim.launch.reading import parse
from netslim.launch.run.directory import claim, config_of_run
from netslim.launch.run.results import read_row, read_rows
from netslim.prune import load
from netslim.train import Store

Refused = Callable[..., None]


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int = 0, stop: int = 4, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ONE = json.dumps(entry([1])).encode()
DEEP = 100_000
TENSORS: dict[str, bytes] = {
    "a header of 2^62 bytes": tensors(b"{}", length=1 << 62),
    "a header of 2^64 - 1 bytes": tensors(b"{}", length=(1 << 64) - 1),
    "a header beyond the end": tensors(b"{}", length=1000),
    "a header of 100 MB claimed": tensors(b"{}", length=100_000_000),
    "no header": b"",
    "tensors that overlap": tensors({"a": entry([1]), "b": entry([1])}, bytes(4)),
    "tensors with a gap": tensors({"a": entry([1]), "b": entry([1], 8, 12)}, bytes(12)),
    "a tensor beyond the end": tensors({"a": entry([1000], 0, 4000)}, bytes(4)),
    "a tensor that ends before it begins": tensors({"a": entry([1], 4, 0)}, bytes(4)),
    "a negative offset": tensors({"a": entry([1], -4, 0)}, bytes(4)),
    "a negative dimension": tensors({"a": entry([-1])}, bytes(4)),
    "a shape of 4 TB": tensors({"a": entry([1 << 40])}, bytes(4)),
    "a shape that overflows": tensors({"a": entry([1 << 32, 1 << 32])}, bytes(4)),
    "nothing, 2^63 wide": tensors({"a": entry([0, 1 << 63], 0, 0)}),
    "nothing, 2^124 wide": tensors({"a": entry([0, 1 << 62, 1 << 62], 0, 0)}),
    "1000 dimensions": tensors({"a": entry([1] * 1000)}, bytes(4)),
    "an unknown type": tensors({"a": entry([1], dtype="PICKLE")}, bytes(4)),
    "a type that torch has no tensors of": tensors({"a": entry([8], dtype="F4")}, bytes(4)),
    "nested lists": tensors(b"[" * DEEP),
    "nested objects": tensors(b'{"a":' * DEEP),
    "nested metadata": tensors({"__metadata__": {"netslim": "[" * DEEP}}),
    "metadata of 5000 digits": tensors({"__metadata__": {"netslim": "1" * 5000}}),
    "a name with NUL": tensors({"a\0b": entry([1])}, bytes(4)),
    "a path for a name": tensors({"../../outside/file": entry([1])}, bytes(4)),
    "a tensor named twice": tensors(b'{"a":' + ONE + b',"a":' + ONE + b"}", bytes(4)),
    "no tensors": tensors({}),
}
JSON: dict[str, bytes] = {
    "nested lists": b"[" * DEEP,
    "nested objects": b'{"a":' * DEEP,
    "a number of 5000 digits": b"1" * 5000,
    "a number beyond all floats": b"1e999",
    "NaN": b"NaN",
    "a list": b"[1, 2]",
    "null": b"null",
    "nothing": b"",
    "an empty object": b"{}",
    "bytes that are no text": b'{"\xff\xfe": 1}',
    "NUL": b"\0" * 4096,
    "32 MB of spaces": b" " * (32 << 20),
}
FIELDS: dict[str, bytes] = {  # of configurations
    "a list for a section": b'{"data": [1]}',
    "a number of 5000 digits for a field": b'{"seed": ' + b"1" * 5000 + b"}",
    "a number beyond all floats for a field": b'{"sparsity": {"weight": 1e999}}',
    "NaN for a field": b'{"sparsity": {"weight": NaN}}',
    "a field that there is not": b'{"__class__": {"__init__": 1}}',
}
YAML: dict[str, bytes] = {
    "a Python object": b"!!python/object/apply:os.mkdir [marker]",
    "a date that is none": b"seed: 2001-99-99",
    "a field given twice": b"seed: 1\nseed: 2",
    "a section given twice": b"prune: {ratio: [0.5]}\nprune: {ratio: [0.9]}",
    "itself for a field": b"seed: &a [*a]",
    "lists of lists of lists": b"\n".join(
        [b"a0: &a0 [x, x]", *(b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))]
    ),
    "a field of lists of lists": b"seed: [&a [x], &b [*a, *a], &c [*b, *b], &d [*c, *c], &e [*d, *d], &f [*e, *e]]",
    "merges of merges": b"\n".join(
        [b"a0: &a0 {x: 1}", *(b"a%d: &a%d {<<: [*a%d, *a%d]}" % (i, i, i - 1, i - 1) for i in range(1, 40))]
    ),
}


def checkpoint(run: Path) -> Path:
    (path,) = (run / "finetune-0.50" / "checkpoints").iterdir()
    return path


def data(run: Path) -> Path:
    (path,) = (path for path in (run.parent / "cache").iterdir() if path.is_dir())
    return path


def config(run: Path) -> RunConfig:
    """The configuration of the run, from where no test puts another."""
    return config_of_run(run / "sparse")


def newest(run: Path) -> object:
    return Store(run / "finetune-0.50" / "checkpoints").newest(print)


def open_images(run: Path) -> object:
    config = DataConfig(cache=run.parent / "cache", size=16, loader="ffcv")
    return open_loaders(config, prepare(config, quiet=True), Shard(0, 1), seed=0, device=torch.device("cpu"))


@dataclass
class Kind:
    """A kind of file: where it is, what reads it there, and what may be in it."""

    place: Callable[[Path], Path]
    read: Callable[[Path], object]
    tried: dict[str, bytes]
    harmless: tuple[str, ...] = ()
    """What is no mistake."""
    index: str | None = None
    """The file beside it that has its size and hash."""

    def put(self, run: Path, content: bytes) -> None:
        """As one would who knows how."""
        place = self.place(run)
        place.write_bytes(content)
        if self.index is not None:
            index = place.with_name(self.index)
            about = json.loads(index.read_text())
            about["files"][place.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            index.write_text(json.dumps(about))


KINDS = {
    "the tensors of a checkpoint": Kind(
        lambda run: checkpoint(run) / "tensors.safetensors",
        newest,
        TENSORS,
        # as files they are right: it is for the run to find that these are not its tensors
        harmless=(
            *("1000 dimensions", "a name with NUL", "a path for a name", "no tensors", "a tensor named twice"),
            *("nested metadata", "metadata of 5000 digits"),
        ),
        index="manifest.json",
    ),
    "the values of a checkpoint": Kind(
        lambda run: checkpoint(run) / "values.json", newest, JSON, index="manifest.json"
    ),
    "the manifest of a checkpoint": Kind(lambda run: checkpoint(run) / "manifest.json", newest, JSON),
    "the weights": Kind(
        lambda run: run / "repair-0.50" / "weights.safetensors", lambda run: load(run / "repair-0.50"), TENSORS
    ),
    "the plan": Kind(lambda run: run / "repair-0.50" / "plan.json", lambda run: load(run / "repair-0.50"), JSON),
    "the configuration of a run": Kind(
        lambda run: run / "config.json", lambda run: claim(run, "digits", config(run)), {**JSON, **FIELDS}
    ),
    "the configuration of a stage": Kind(
        lambda run: run / "repair-0.50" / "config.json",
        lambda run: read_slimmed(run / "repair-0.50"),
        {**JSON, **FIELDS},
    ),
    "the metrics of a stage": Kind(
        lambda run: run / "sparse" / "metrics.json", lambda run: read_row(run / "sparse" / "metrics.json"), JSON
    ),
    "the results": Kind(lambda run: run / "results.json", read_rows, JSON),
    "the --config file": Kind(
        lambda run: run / "mine.yaml",
        lambda run: parse("netslim", "", digits(), ["--config", str(run / "mine.yaml")]),
        {**JSON, **FIELDS, **YAML},
        harmless=("an empty object",),
    ),
    "what is known of the images": Kind(lambda run: data(run) / "info.json", open_images, JSON),
    "the images": Kind(
        lambda run: data(run) / "train.beton", open_images, {**JSON, "zeros": bytes(1 << 20)}, index="info.json"
    ),
}


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """A run whose fine-tuning was stopped after its first step, with all stages before it."""
    directory = tmp_path_factory.mktemp("malicious") / "run"
    for command in ("sparsify", "prune", "repair"):
        assert dispatch([command, *(str(flag) for flag in flags(directory, data_cache))]) == 0
    stopped(["finetune", *flags(directory, data_cache)], step=1)
    return directory


@pytest.fixture
def run(run_files: Path, data_cache: Path, tmp_path: Path) -> Path:
    """A copy of that run, with the images that it uses beside it."""
    info = prepare(DataConfig(cache=data_cache, size=16), quiet=True)
    assert info.directory is not None
    shutil.copytree(info.directory, tmp_path / "cache" / info.directory.name)
    return Path(shutil.copytree(run_files, tmp_path / "run"))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Calls what reads a crafted file, as a command would: code 2 and one line have to come, soon, and nothing else."""
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    (outside / ".private").mkdir(parents=True)
    (outside / "file").write_text("whole")

    def check(name: str, call: Callable[[], object], *parts: str) -> None:
        capfd.readouterr()
        memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

        def body() -> None:
            call()

        code, error = guarded(body), capfd.readouterr().err
        assert code == MISTAKE, name
        assert_one_line(error, *parts)
        assert len(error) < 20_000, name
        assert time.monotonic() - started < 20, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20, name  # KiB: a GB
        assert not (tmp_path / "marker").exists(), name
        assert sorted(path.name for path in outside.iterdir()) == [".private", "file"], name
        assert (outside / "file").read_text() == "whole", name

    yield check
    pickle.loads(pickled())  # it would have worked
    assert (tmp_path / "marker").exists()


def pickled() -> bytes:
    return pickle.dumps(Malicious(os.mkdir, "marker"))


@pytest.mark.parametrize("name", KINDS)
def test_a_crafted_file_is_refused_in_one_line(name: str, run: Path, refused: Refused) -> None:
    kind = KINDS[name]
    (run / "mine.yaml").write_text("seed: 0")
    kind.read(run)
    for what, content in {**kind.tried, "a pickle": pickled()}.items():
        kind.put(run, content)
        if what in kind.harmless:
            kind.read(run)
        else:
            refused(f"{name}: {what}", lambda: kind.read(run))


def forge(run: Path, **values: Any) -> None:
    """Write another plan with every digest as it should be, also that in the weights."""
    stage = run / "repair-0.50"
    content = {**json.loads((stage / "plan.json").read_text()), **values}
    del content["digest"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (stage / "plan.json").write_text(json.dumps({**content, "digest": digest}))
    weights = safetensors.torch.load_file(stage / "weights.safetensors")
    about = {"netslim": json.dumps({"version": 1, "plan": digest})}
    safetensors.torch.save_file(weights, stage / "weights.safetensors", about)


ORIGINS: list[dict[str, Any]] = [
    *({"function": f"{function}"} for function in ("os:system", "subprocess:run", "builtins:exec", "pickle:loads")),
    *({"function": f"{function}"} for function in ("builtins:eval", "importlib:import_module", "shutil:rmtree")),
    *({"function": f"os:{name}"} for name in ("mkdir", "remove", "popen", "path.join")),
    *({"function": f"netslim.prune:{name}"} for name in ("load", "save", "slim", "Plan", "__all__", "__path__", "no")),
    *({"function": f"netslim.launch.{name}"} for name in ("cli:main", "recipe:enter", "run:launch", "cli:difflib")),
    *({"function": f"torch:{name}"} for name in ("load", "save", "nn", "hub", "ops.load_library")),
    *({"function": f"torchvision.models:{name}"} for name in ("get_model_weights", "vgg", "__name__")),
    *({"function": function} for function in ("", ":", "os", "../outside:run", "os\0:system", "/tmp/x:run", "a b:c")),
    *({"function": "stranger:run", "name": name} for name in ("touch marker", "../../outside/file", "\0")),
    {"function": "netslim.train.models:build_network", "name": "../../outside/file"},
    {"function": "netslim.train.models:build_network", "name": "os:system"},
    {"function": "netslim.train.models:build_network", "name": "vgg11", "width": 1e300},
    {"function": "netslim.train.models:build_network", "name": "vgg11", "width": 1e5},
    {"function": "netslim.train.models:build_network", "name": "vgg11", "width": -1.0},
    {"function": "netslim.train.models:build_network", "name": "vgg11", "num_classes": 10**15},
    {"function": "netslim.train.models:build_network", "name": "vgg11", "num_classes": 10**400},
    {"function": "torchvision.models:get_model", "name": "resnet18", "num_classes": 10**15},
    {"function": "torchvision.models:get_model", "name": "resnet18", "weights": "DEFAULT"},
    {"function": ["os", "system"]},
]


def test_a_plan_with_right_digests_builds_nothing_but_networks(run: Path, refused: Refused) -> None:
    Path("stranger.py").write_text("import os\nos.mkdir('marker')\ndef run(**_): os.mkdir('marker')\n")
    for origin in ORIGINS:
        forge(run, origin={"name": None, "width": None, "num_classes": 10, **origin})
        refused(str(origin), lambda: load(run / "repair-0.50"))


def test_a_plan_with_right_digests_cuts_nothing_but_what_there_is(run: Path, refused: Refused) -> None:
    content = json.loads((run / "repair-0.50" / "plan.json").read_text())
    layer, part = content["layers"][0], content["slices"][0]
    for values in (
        {"ratio": float("nan")},
        {"ratio": float("inf")},
        {"threshold": float("nan")},
        {"num_removed": 10**400},
        {"num_channels": -1},
        {"layers": []},
        {"slices": []},
        *({"layers": [{**layer, **other}, *content["layers"][1:]]} for other in (
            {"width": 10**12},
            {"width": 10**400},
            {"kept": [-1]},
            {"kept": [10**12]},
            {"kept": [0, 0]},
            {"name": "../../outside/file"},
            {"name": "__class__"},
            {"name": "a\0b"},
        )),
        *({"slices": [{**part, **other}, *content["slices"][1:]]} for other in (
            {"num_inputs": 10**12, "inputs": [10**12 - 1]},
            {"inputs": [-1]},
            {"num_outputs": 10**12},
            {"name": "features.0.weight"},
            {"name": ""},
        )),
        {"slices": [*content["slices"], {**part, "name": "features"}]},
        {"selections": [{"name": layer["name"], "num_before": 1, "num_after": 1, "before": [10**9], "after": None}]},
    ):  # fmt: skip
        forge(run, **{**content, **values})
        refused(str(values)[:200], lambda: load(run / "repair-0.50"))


def test_a_manifest_leads_nowhere(run: Path, refused: Refused) -> None:
    path = checkpoint(run) / "manifest.json"
    content = json.loads(path.read_text())
    right = content["files"]["values.json"]
    for name in ("../../../../outside/file", "/dev/zero", "\0"):
        files = {**content["files"], name: right}
        path.write_text(json.dumps({**content, "files": files}))
        newest(run)  # what nobody asks for is not looked at
        del files["values.json"]
        path.write_text(json.dumps({**content, "files": files}))
        refused(name, lambda: newest(run))
    for files in (
        *({**content["files"], "values.json": {**right, "bytes": size}} for size in (-1, 10**30, "1", None, True)),
        *({**content["files"], "values.json": {**right, "sha256": sha256}} for sha256 in ("", None, [], 0)),
        *({**content["files"], "values.json": odd} for odd in ("../../outside/file", None, [], 5)),
        *([], None, "x", 5),
    ):
        path.write_text(json.dumps({**content, "files": files}))
        refused(str(files)[-200:], lambda: newest(run))
    for version in (0, 2, "1", None, [], 10**400, float("nan")):
        path.write_text(json.dumps({**content, "format": version}))
        refused(f"format {version}"[:80], lambda: newest(run))


def test_what_is_known_of_the_images_leads_nowhere(run: Path, refused: Refused) -> None:
    path = data(run) / "info.json"
    content = json.loads(path.read_text())
    right, other = content["files"]["train.beton"], content["files"]["test.beton"]
    for values in (
        *(
            {"files": {name: right, "test.beton": other}}
            for name in ("../../outside/file", "/dev/zero", "a\0b", "", ".")
        ),
        *({"files": {**content["files"], name: right}} for name in ("../../outside/file", "/dev/zero")),
        *({"files": {"test.beton": other, "train.beton": odd}} for odd in (None, [], "x", {**right, "bytes": -1})),
        *({"files": files} for files in ({}, None, [])),
        *({key: value} for key in ("num_train", "num_test") for value in (0, -1, 1, 10**15, 10**400, 1.5, "9", None)),
        *({key: [value] * 3} for key in ("mean", "std") for value in (float("nan"), -1.0, 10**400, "0", None)),
        *({key: [0.5] * count} for key in ("mean", "std") for count in (0, 2, 4)),
        *({"std": [0.0] * 3}, {"size": 0}, {"size": -1}, {"size": "16"}, {"classes": []}, {"classes": [1]}),
        *({"loader": "pickle"}, {"loader": "torch"}, {"extra": 1}),
    ):
        path.write_text(json.dumps({**content, **values}))
        refused(str(values)[:200], lambda: open_images(run))


def test_images_without_their_index_are_refused(run: Path, refused: Refused) -> None:
    whole = (data(run) / "train.beton").read_bytes()
    for what, content in {
        "half": whole[: len(whole) // 2],
        "the images of the other split": (data(run) / "test.beton").read_bytes(),
        "2^63 images": whole[:4] + (1 << 63).to_bytes(8, "little") + whole[12:],
        "65535 fields": whole[:2] + b"\xff\xff" + whole[4:],
        "another version": b"\xff\xff" + whole[2:],
    }.items():
        KINDS["the images"].put(run, content)
        refused(what, lambda: open_images(run))


def replace_by_link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def replace_by_pipe(path: Path, _: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def replace_by_directory(path: Path, _: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "the configuration of a run"])
def test_what_only_looks_like_a_file_is_not_read(name: str, run: Path, refused: Refused) -> None:
    kind, place = KINDS[name], KINDS[name].place(run)
    for what, replace, target in (
        ("a link to zeros without end", replace_by_link, Path("/dev/zero")),
        ("a link to nothing", replace_by_link, Path("nothing")),
        ("a link to a file of another kind", replace_by_link, run.parent / "outside" / "file"),
        ("a link to itself", replace_by_link, place),
        ("a pipe", replace_by_pipe, place),
        ("a directory", replace_by_directory, place),
    ):
        replace(place, target)
        refused(f"{name}: {what}", lambda: kind.read(run))
        place.rmdir() if place.is_dir() else place.unlink()


def test_a_configuration_is_written_in_the_place_of_a_link_and_not_through_it(run: Path) -> None:
    place, target = run / "config.json", run.parent / "outside.json"
    for replace in (replace_by_link, replace_by_pipe):
        shutil.copy(place, target)
        before = target.read_bytes()
        replace(place, target)
        claim(run, "digits", replace_fields(config(run), max_restarts=7))
        assert target.read_bytes() == before
        assert not place.is_symlink()
        assert json.loads(place.read_text())["max_restarts"] == 7


def test_a_checkpoint_that_is_a_link_or_has_a_name_of_its_own_is_not_used(run: Path, refused: Refused) -> None:
    path = checkpoint(run)
    moved = path.rename(run.parent / "moved")
    path.symlink_to(moved)
    refused("a link to a checkpoint", lambda: newest(run), "it is a link")
    path.unlink()
    shutil.copytree(moved, path)
    names = ["step-99999999999999999999", f"step-{'9' * 200}", "step-00000002"]
    for name in names:
        for content in (moved, run / "sparse"):  # a copy of the checkpoint of another step, and no checkpoint
            shutil.copytree(content, path.with_name(name))
            path.rename(run.parent / "away")
            refused(name, lambda: newest(run), name)
            (run.parent / "away").rename(path)
            newest(run)  # which is the one before
            shutil.rmtree(path.with_name(name))
    for name in (
        "step-000000001",
        "step--0000001",
        "step-0000000१",
        "step-00000001\n",
        "step-1e9",
        "step-",
        "..step-1",
    ):
        shutil.copytree(run / "sparse", path.with_name(name))
    found = Store(path.parent).newest(print)
    assert found is not None
    assert found.step == 1


def test_nothing_is_swept_from_where_checkpoints_lead_but_what_was_left_of_checkpoints(run: Path) -> None:
    home = run.parent / "home"
    for name in (".ssh", ".step-00000001", ".step-00000001.0123abcd", ".step-00000001.0123abcd.old", "step-1"):
        (home / name).mkdir(parents=True)
    shutil.rmtree(checkpoint(run).parent)
    (run / "finetune-0.50" / "checkpoints").symlink_to(home)
    Store(run / "finetune-0.50" / "checkpoints").sweep()
    assert sorted(path.name for path in home.iterdir()) == [
        ".ssh",
        ".step-00000001",
        ".step-00000001.0123abcd.old",
        "step-1",
    ]


VALUES: list[dict[str, Any]] = [
    *({"world_size": value} for value in (0, -1, 2, 10**12, 10**400, "1", None, [1])),
    *({"epoch": value} for value in (-1, 1, 10**12, float("nan"), None)),
    *({"step_in_epoch": value} for value in (-1, 0, 2, 10**12, 1.5)),
    *({"metrics": value} for value in (None, {}, [{}], [{"step": 1, "accuracy": 1.0}], "x")),
    *({"seconds": value} for value in (-1.0, float("nan"), float("inf"), "1", None)),
    *({"scaler": value} for value in (None, [], {"scale": float("nan")}, {"x": "y"})),
    *({"identity": value} for value in (None, [], {}, "x", {"../../outside/file": 1})),
]


def test_a_run_does_not_go_on_from_values_that_it_cannot_have_saved(
    run: Path, data_cache: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    command = [str(argument) for argument in ["finetune", *flags(run, data_cache)]]
    path = checkpoint(run) / "values.json"
    content, kind = json.loads(path.read_text()), KINDS["the values of a checkpoint"]
    for values in VALUES:
        kind.put(run, json.dumps({**content, **values}).encode())
        refused(str(values)[:200], lambda: dispatch(command))
    assert not (run / "finetune-0.50" / "weights.safetensors").exists()


def test_a_run_does_not_go_on_from_tensors_that_it_cannot_have_saved(
    run: Path, data_cache: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    command = [str(argument) for argument in ["finetune", *flags(run, data_cache)]]
    kind = KINDS["the tensors of a checkpoint"]
    whole = safetensors.torch.load(kind.place(run).read_bytes())
    weight, momentum, buffer = (
        next(name for name in sorted(whole) if name.startswith(start) and whole[name].numel() > 1)
        for start in ("weights/", "momenta/", "ranks/0/buffers/")
    )
    random = "ranks/0/rng/cpu"
    changes: list[dict[str, torch.Tensor | None]] = [
        *({name: None} for name in (weight, momentum, buffer, random)),
        *({name: torch.zeros(1)} for name in (weight, momentum, buffer, random, "../../outside/file", "a\0b")),
        *({name: whole[name].to(torch.complex64)} for name in (weight, momentum, buffer)),
        *({name: torch.zeros(5)} for name in ("ranks/0/sums", "ranks/0/rng/cuda", "ranks/1/sums")),
        *({random: torch.full_like(whole[random], value)} for value in (1, 255)),
    ]
    for change in changes:
        tensors = {name: value for name, value in {**whole, **change}.items() if value is not None}
        kind.put(run, safetensors.torch.save(tensors))
        refused(str(list(change)), lambda: dispatch(command), "is not one that this run saves")
    for what in kind.harmless:
        kind.put(run, TENSORS[what])
        refused(what, lambda: dispatch(command), "is not one that this run saves")
    assert not (run / "finetune-0.50" / "weights.safetensors").exists()


COMMANDS = {
    "the tensors of a checkpoint": ["finetune"],
    "the values of a checkpoint": ["finetune"],
    "the manifest of a checkpoint": ["finetune"],
    "the weights": ["finetune"],
    "the plan": ["finetune"],
    "the configuration of a run": ["run"],
    "the metrics of a stage": ["run"],
    "the results": ["sparsify"],
    "the --config file": ["run", "--config", "run/mine.yaml"],
    "what is known of the images": ["finetune", "--data.cache", "cache"],
    "the images": ["finetune", "--data.cache", "cache"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_a_pickle_whatever_its_name(
    name: str, run: Path, data_cache: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    (command, *others) = COMMANDS[name]
    KINDS[name].put(run, pickled())
    refused(name, lambda: dispatch([command, *(str(flag) for flag in flags(run, data_cache)), *others]))
    assert not (run / "finetune-0.50" / "weights.safetensors").exists()
