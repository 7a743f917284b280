"""The command line: what a user sees for help, and for each mistake."""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Disk
from PIL import Image
from torch import nn
from whole_run import SCRIPT, call, results

import netslim as package
from netslim.launch.cli import COMMANDS, dispatch
from netslim.launch.config import RunConfig, field_names, to_yaml
from netslim.launch.help import fields_of, presets
from netslim.launch.inspect.demand import kept_for_backward, training_demand
from netslim.launch.inspect.describe import describe
from netslim.launch.presets import PRESETS
from netslim.launch.reading import parse
from netslim.launch.run import read_rows
from netslim.launch.run.directory import claim
from netslim.train import EngineConfig, ModelConfig

Netslim = Callable[..., tuple[int, str]]


def smallest(directory: Path, data_cache: Path) -> list[object]:
    """Flags of the smallest run there is: one process, one epoch."""
    return [
        *("digits", "--run-dir", directory, "--data.cache", data_cache, "--num-processes", 1),
        *("--model.width", 0.0625, "--sparsify.epochs", 1, "--finetune.epochs", 1, "--data.batch-size", 256),
        *("--record.wandb", "disabled", "--data.size", 16),
    ]


@pytest.fixture
def tiny(tmp_path: Path, data_cache: Path) -> list[object]:
    return smallest(tmp_path / "run", data_cache)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of two classes with four images in each split."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            directory = tmp_path / "images" / split / name
            directory.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                    directory / f"{number}.png"
                )
    return tmp_path / "images"


def flags_of_few(root: Path, count: int) -> list[object]:
    """Flags of a small run in one process on so many training images, made here in a folder."""
    generator = np.random.default_rng(0)
    for split, num in (("train", count), ("test", 8)):
        for number in range(num):
            directory = root / "images" / split / ("cat", "dog")[number % 2]
            directory.mkdir(parents=True, exist_ok=True)
            image = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(image).save(directory / f"{number}.png")
    return [
        *("digits", "--run-dir", root / "run", "--data.cache", root / "cache", "--num-processes", 1),
        *("--data.source", "folder", "--data.root", root / "images", "--data.loader", "torch", "--data.num-workers", 0),
        *("--data.size", 16, "--data.batch-size", 4, "--sparsify.epochs", 1, "--finetune.epochs", 1),
        *("--prune.ratio", 0.5, "--record.wandb", "disabled"),
    ]


def assert_one_line(error: str, *parts: str) -> None:
    assert error.count("\n") == 1, error
    assert error.startswith("netslim: ")
    for part in parts:
        assert part in error


def assert_ends_with_results(printed: str, run: Path) -> None:
    """The table and where it is for scripts, once."""
    assert printed.splitlines()[-1] == f"{run}/results.json"
    assert printed.count("results.json") == 1
    (row,) = results(run)["rows"]
    head, line = printed.splitlines()[-3:-1]
    assert head.split() == list(row)
    assert line.split()[:4] == ["sparse", "0.00", f"{row['accuracy']:.2%}", f"{row['params']:,}"]


def test_help_names_commands_and_presets(capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["--help"]) == 0
    text = capfd.readouterr().out
    for word in (*COMMANDS, "digits", "lab-vgg19-cifar10", "resnet50-imagenet"):
        assert word in text


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_needs_no_more_than_80_columns(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        dispatch(arguments)
    text = re.sub(r"^usage: netslim export .*", "", capfd.readouterr().out)  # a line that tyro makes by itself
    assert {line for line in text.splitlines() if len(line) > 80} == set()


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m netslim`` with a list of what it imports on stderr."""
    command = [sys.executable, "-X", "importtime", "-m", "netslim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["help", "run"],
        ["prune"],
        ["completion", "bash"],
        ["rum", "digits"],
        ["run", "digit"],
        ["inspect", "runs/nope"],
        ["digits"],
    ],
    ids=" ".join,
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments: list[str]) -> None:
    imported = set(re.findall(r"\| +([\w.]+)$", program(*arguments).stderr, re.MULTILINE))
    assert "netslim.launch.cli" in imported
    assert not imported & {"torch", "accelerate", "wandb", "pydantic", "numpy", "tyro", "netslim.train"}


def test_help_comes_within_half_a_second() -> None:
    def seconds() -> float:
        """Of a processor: on the clock it also waits for whatever else this machine does."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "netslim", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert statistics.median(seconds() for _ in range(5)) < 0.5


def test_the_version_is_that_of_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["--version"]) == 0
    assert capfd.readouterr().out == f"netslim {package.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", package.__version__)


@pytest.mark.parametrize(("words", "same"), [([], ["--help"]), (["prune"], ["prune", "--help"])])
def test_help_of_a_command_is_what_the_command_says_itself(
    words: list[str], same: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(["help", *words]) == 0
    said = capfd.readouterr().out
    assert dispatch(same) == 0
    assert capfd.readouterr().out == said


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "netslim", "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_what_is_read_from_the_sources_is_what_they_define() -> None:
    assert list(presets()) == list(PRESETS)
    assert presets() == {name: (make.__doc__ or "").splitlines()[0] for name, make in PRESETS.items()}
    assert [field.name for field in fields_of()] == field_names(RunConfig())
    choices = {field.name: field.choices for field in fields_of()}
    assert choices["prune.coupling"] == ("group", "select")
    assert choices["finetune.start"] == ("slim", "cut", "scratch")
    assert choices["engine.precision"] == ("no", "bf16", "fp16")
    assert all(field.about for field in fields_of())


def flags_of(help_all: str) -> set[str]:
    return set(
        re.findall(r"(?<![\w-])--[a-z][\w.-]*", re.sub(r"--config FILE.*?width 1\.", "", help_all, flags=re.DOTALL))
    )


def test_short_help_names_what_people_set_and_where_the_rest_is(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        dispatch(["run", "digits", "--help", "--prune.passes", "3"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    for word in ("--prune.ratio", "--sparsity.weight", "--run-dir", "--config", "--help-all", "default: 0.5 0.9"):
        assert word in text
    assert "--prune.min-channels" not in text
    assert text.count("\n") < 90


def test_help_all_lists_every_field_of_a_preset(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        dispatch(["run", "digits", "--help-all"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    assert {field.flag for field in fields_of()} <= set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text))
    for word in ("--prune.ratio", "--sparsity.weight", "--run-dir", "--config", "default: 0.5 0.9"):
        assert word in text


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers in the place of the last word."""
    typed = " ".join(map(shlex.quote, words))
    ask = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _netslim; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_presets_flags_and_values(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["completion", "bash"]) == 0
    script = tmp_path / "netslim.bash"
    script.write_text(capfd.readouterr().out)
    assert completed(script, "netslim", "s") == ["sparsify", "submit", "sweep"]
    assert completed(script, "netslim", "run", "v") == ["vgg19-cifar10"]
    assert completed(script, "netslim", "run", "digits", "--prune.ro") == ["--prune.round-to"]
    assert completed(script, "netslim", "run", "digits", "--dr") == ["--dry-run"]
    assert completed(script, "netslim", "prune", "digits", "--prune.coupling", "") == ["group", "select"]
    assert completed(script, "netslim", "export", "runs/x", "--format", "") == ["onnx", "pt2", "weights"]
    assert completed(script, "netslim", "compare", "runs/x", "--format", "c") == ["csv"]
    assert completed(script, "netslim", "submit", "digits", "--gpus") == ["--gpus-per-node"]
    assert completed(script, "netslim", "completion", "") == ["bash", "zsh"]


def test_the_console_script_ends_a_mistake_with_one_line_and_code_2() -> None:
    script = Path(sys.executable).with_name("netslim")
    result = subprocess.run([script, "run", "digit"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_line(result.stderr, "no preset is called 'digit'", "digits")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rum", "digits"], ["no command is called 'rum'", "run"]),
        (["digits"], ["digits is a preset, no command", "netslim run digits"]),
        (["help", "rum"], ["no command is called 'rum'", "run"]),
        (["completion", "fish"], ["there is completion for bash and zsh, not for 'fish'"]),
        (["inspect", "runs/nope"], ["no run directory runs/nope", "no preset is called 'runs/nope'", "digits"]),
        (["config", "nope"], ["no run directory nope", "no preset is called 'nope'", "digits"]),
        (["sweep", "runs/nope"], ["no sweep directory runs/nope", "no preset is called 'runs/nope'", "digits"]),
        (["data", "digits", "--dry-run"], ["there is no field --dry-run"]),
        (["run", "lab"], ["no preset is called 'lab'", "lab-vgg19-cifar10"]),
        (["run", "digits", "--prun.ratio", "0.5"], ["--prun.ratio", "--prune.ratio"]),
        (["run", "digits", "--model.name", "vgg91"], ["no model is called 'vgg91'", "vgg19"]),
        (["run", "digits", "--data.source", "cifar"], ["'cifar'", "cifar10", "cifar100", "folder"]),
        (["run", "digits", "--prune.ratio", "1.0"], ["prune.ratio is 1.0", "less than 1"]),
        (["run", "digits", "--prune.ratio", "-0.5"], ["prune.ratio is -0.5", "greater than or equal to 0"]),
        (["run", "digits", "--sparsity.weight", "-1"], ["sparsity.weight is -1", "greater than or equal to 0"]),
        (["run", "digits", "--num-processes", "3"], ["batch size 64 is not a multiple of 3 ranks", "try", "63"]),
        (["run", "digits", "--engine.precision", "fp16"], ["fp16 needs a GPU", "bf16"]),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    arguments: list[str], parts: list[str], netslim: Netslim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = netslim(*arguments)
    assert code == 2
    assert_one_line(error, *parts)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("num_processes", "left"),
    [
        (1, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}),
        pytest.param(
            2,
            {"PMI_RANK": "1", "PMI_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "PET_NNODES": "2", "TORCHELASTIC_RUN_ID": "x"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_another_launcher_left_in_the_environment_is_ignored_with_one_line(
    num_processes: int, left: dict[str, str], tiny: list[object]
) -> None:
    """By it the processes would wait for ranks that nobody starts."""
    flags = ["--num-processes", num_processes, "--data.loader", "torch", "--data.num-workers", 0]
    done = call(SCRIPT, "sparsify", *tiny, *flags, timeout=300, ACCELERATE_USE_CPU="1", **left)
    assert done.returncode == 0, done.stderr
    ignored = [line for line in done.stderr.splitlines() if "ignores" in line]
    assert len(ignored) == 1
    assert f"ignores {', '.join(sorted(left))} of the environment" in ignored[0]
    assert "under a launcher use python -m netslim.launch.recipe" in ignored[0]
    assert results(Path(str(tiny[2])))["world_size"] == num_processes
    assert_ends_with_results(done.stdout, Path(str(tiny[2])))


@pytest.mark.parametrize(("kind", "started"), [("MULTI_GPU", 2), ("MULTI_CPU", 1)])
def test_the_launchers_file_for_the_cpu_starts_its_two_processes_and_one_that_starts_fewer_is_told(
    kind: str, started: int, tiny: list[object], tmp_path: Path
) -> None:
    """Accelerate takes MULTI_CPU for one process, and says nothing."""
    text = (Path(__file__).parents[1] / "launch" / "accelerate" / "cpu.yaml").read_text()
    file = tmp_path / "accelerate.yaml"
    file.write_text(text.replace("distributed_type: MULTI_GPU", f"distributed_type: {kind}"))
    flags = [*tiny, "--data.loader", "torch", "--data.num-workers", 0]
    launched = [SCRIPT.with_name("accelerate"), "launch", "--config_file", file, "-m", "netslim.launch.recipe", *flags]
    done = call(*launched, timeout=300, NETSLIM_STAGES="sparsify")
    assert done.returncode == 0, done.stderr
    assert results(Path(str(tiny[2])))["world_size"] == started
    assert_ends_with_results(done.stdout, Path(str(tiny[2])))
    warnings = [line for line in done.stderr.splitlines() if "asked for" in line]
    assert [line.partition("; ")[0] for line in warnings] == [
        "netslim: warning: accelerate launch was asked for 2 processes and started 1"
    ] * (2 - started)


def test_a_mistake_is_reported_as_no_ranks_whatever_the_environment_says(tmp_path: Path) -> None:
    done = call(SCRIPT, "run", "digit", RANK="3", WORLD_SIZE="4")
    assert done.returncode == 2
    assert_one_line(done.stderr, "no preset is called 'digit'")
    assert "rank 3" not in done.stderr


def test_more_processes_than_gpus_is_refused(
    netslim: Netslim, tiny: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    code, error = netslim("run", *tiny, "--no-cpu", "--num-processes", 2)
    assert code == 2
    assert_one_line(error, "2 processes need as many GPUs and this machine has 1", "--num-processes 1")


def test_an_empty_class_folder_is_named(netslim: Netslim, tiny: list[object], folder: Path) -> None:
    shutil.rmtree(folder / "train" / "dog")
    (folder / "train" / "dog").mkdir()
    code, error = netslim("data", *tiny, "--data.source", "folder", "--data.root", folder)
    assert code == 2
    assert_one_line(error, "train/dog")


def test_a_truncated_image_is_named(netslim: Netslim, tiny: list[object], folder: Path) -> None:
    image = folder / "train" / "cat" / "2.png"
    image.write_bytes(image.read_bytes()[:200])
    code, error = netslim("data", *tiny, "--data.source", "folder", "--data.root", folder)
    assert code == 2
    assert_one_line(error, str(image))


def test_all_unreadable_images_are_one_line(netslim: Netslim, tiny: list[object], folder: Path) -> None:
    bad = [folder / name for name in ("train/cat/2.png", "train/dog/0.png", "test/dog/3.png")]
    for path in bad:
        path.write_bytes(b"")
    code, error = netslim("data", *tiny, "--data.source", "folder", "--data.root", folder)
    assert code == 2
    assert_one_line(error, "3 of 16 images cannot be read", *(f"{path} (it is empty)" for path in bad))


def test_what_was_left_out_and_cut_of_images_is_said_once(netslim: Netslim, tiny: list[object], folder: Path) -> None:
    (folder / "train" / "cat" / "a.heic").touch()
    Image.new("RGB", (96, 32)).save(folder / "train" / "dog" / "wide.gif")
    flags = [*tiny, "--data.source", "folder", "--data.root", folder, "--data.batch-size", 8, "--cpu"]
    flags += ["--data.loader", "torch", "--data.num-workers", 0]
    notes = [f"left out of {folder}: 1 .heic", "far from square (over 1.5 to 1) are 1 of 17 images, up to 3.0 to 1"]
    for command, start in (("data", "netslim: warning: "), ("sparsify", "sparse: warning: ")):
        code, said = netslim(command, *flags)
        assert code == 0
        assert [said.count(f"{start}{note}") for note in notes] == [1, 1]
        assert said.count("heic") == said.count("far from square") == 1


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped"])
def test_a_damaged_beton_is_refused(
    damage: str, netslim: Netslim, tiny: list[object], folder: Path, tmp_path: Path
) -> None:
    flags = [*tiny, "--data.source", "folder", "--data.root", folder, "--data.cache", tmp_path / "cache"]
    assert netslim("data", *flags)[0] == 0
    (beton,) = (tmp_path / "cache").glob("*/train.beton")
    content = bytearray(beton.read_bytes())
    content[-1] ^= 1
    beton.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    code, error = netslim("data", *flags)
    assert code == 2
    assert_one_line(error, "train.beton")


@pytest.mark.parametrize(
    ("stage", "first"),
    [
        ("prune", "netslim sparsify digits"),
        ("repair", "netslim sparsify digits"),
        ("finetune", "netslim repair digits"),
    ],
)
def test_a_missing_artefact_names_the_command_that_makes_it(
    stage: str, first: str, netslim: Netslim, tiny: list[object]
) -> None:
    code, error = netslim(stage, *tiny)
    assert code == 2
    assert_one_line(error, "holds no finished stage", first)


def test_a_ratio_that_the_floors_do_not_allow_is_refused_before_any_training(
    netslim: Netslim, tiny: list[object], tmp_path: Path
) -> None:
    code, error = netslim("run", *tiny, "--prune.ratio", "0.9", "--prune.min-share", "0.5")
    assert code == 2
    assert_one_line(error, "ratio 0.9", "min_share 0.5", "the largest ratio possible is 0.5")
    assert not (tmp_path / "run" / "sparse").exists()


def test_a_mistake_can_be_mended_in_the_same_run_directory(netslim: Netslim, tiny: list[object]) -> None:
    assert netslim("run", *tiny, "--prune.min-share", "0.5")[0] == 2
    assert netslim("sparsify", *tiny)[0] == 0


def test_a_run_directory_of_another_configuration_lists_the_fields_that_differ(
    netslim: Netslim, tiny: list[object]
) -> None:
    assert netslim("sparsify", *tiny)[0] == 0
    code, error = netslim("run", *tiny, "--sparsity.weight", "0.1", "--seed", "3")
    assert code == 2
    assert_one_line(error, "sparsity.weight was 0.01, now 0.1", "seed was 0, now 3", "another --run-dir")


@pytest.mark.parametrize("place", ["below a file", "where nobody may write"])
def test_a_run_directory_that_cannot_be_made_is_named(
    place: str, netslim: Netslim, tiny: list[object], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "run" if place == "below a file" else Path("/proc/self/run")
    for command in ("run", "sweep"):
        code, error = netslim(command, *tiny, "--run-dir", directory)
        assert code == 2
        assert_one_line(error, f"{directory} cannot be written", "name another folder with --run-dir")


def test_a_full_disk_ends_the_run_and_leaves_no_stage_that_looks_complete(
    netslim: Netslim, tiny: list[object], full_disk: Path
) -> None:
    code, error = netslim("run", *tiny, "--run-dir", full_disk)
    assert code == 2
    assert_one_line(
        error, f"{full_disk}", "No space left on device", "MiB are free; free some, or use another --run-dir"
    )
    assert not list(full_disk.glob("*/metrics.json"))


def test_what_is_no_run_is_answered_by_the_runs_that_there_are(
    netslim: Netslim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        claim(Path("runs") / name, "digits", RunConfig())
    code, error = netslim("inspect", "runs/frist")
    assert code == 2
    assert_one_line(
        error, "no run directory runs/frist", "the runs are runs/first, runs/second", "the presets are digits"
    )
    code, error = netslim("run", "runs/first")
    assert code == 2
    assert_one_line(error, "runs/first is a run directory, of the preset digits", "--run-dir runs/first")


@pytest.mark.parametrize("form", ["dry run", "config"])
@pytest.mark.parametrize("name", ["digits", "preresnet164-cifar10"])
def test_a_configuration_that_is_printed_is_one_that_is_read(
    form: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    flags = [
        "--model",
        "preresnet20",
        "--prune.ratio",
        "0.25",
        "--prune.exclude",
        "blocks.0.*",
        "--record.tags",
        "no",
    ]
    arguments = ["run", name, *flags, "--dry-run"] if form == "dry run" else ["config", name, *flags]
    assert dispatch(arguments) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capfd.readouterr().out)
    assert parse("", "", PRESETS["resnet50-imagenet"](), ["--config", str(file)]) == parse(
        "", "", PRESETS[name](), flags
    )
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


def test_the_configuration_of_a_run_is_printed_from_its_directory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(model=ModelConfig(name="vgg13", width=0.125), run_dir=tmp_path)
    claim(tmp_path, "digits", config)
    assert dispatch(["config", str(tmp_path)]) == 0
    assert capfd.readouterr().out == to_yaml(config)


def comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


def test_a_dry_run_says_stages_cuts_memory_and_disk_and_touches_nothing(
    tiny: list[object], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    flags = ["--prune.ratio", "0.25", "0.5", "--data.cache", str(tmp_path / "cache")]
    assert dispatch(["run", *map(str, tiny), *flags, "--dry-run"]) == 0
    said = comments(capfd.readouterr().out)
    assert "sparsity training, 1 epochs of 5 steps" in said
    assert "# prune-0.25     cut 43 of 172 channels" in said
    assert "# prune-0.50     cut 86 of 172 channels" in said
    assert said.count("to do") == 7
    assert "172 of 172 channels are prunable" in said
    assert "warning: pull 0.031 = lambda 0.01 x" in said
    assert re.search(r"memory of training: about [\d.,]+ MB of each process", said)
    assert re.search(rf"disk: at most [\d.,]+ MB in {tmp_path}/run: 7 networks", said)
    assert not any(tmp_path.iterdir())


def test_a_dry_run_says_what_is_done_and_why_channels_stay(
    netslim: Netslim, tiny: list[object], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*map(str, tiny), "--model", "preresnet20", "--model.width", "0.25", "--prune.ratio", "0.25"]
    assert netslim("sparsify", *flags)[0] == 0
    assert dispatch(["run", *flags, "--dry-run"]) == 0
    said = comments(capfd.readouterr().out)
    assert re.search(r"# sparse .* done$", said, re.MULTILINE)
    assert said.count("to do") == 3
    assert re.search(r"\d+ of \d+ channels are prunable; \d+ stay: ", said)


def test_what_a_forward_pass_keeps_is_counted_to_the_byte() -> None:
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    network = nn.Sequential(convolutions[0], nn.BatchNorm2d(8), nn.ReLU(), convolutions[1])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, 3, 16, 16)
    pixels, floats = 2 * 16 * 16, 4
    # the images, what the BatchNorm reads and what the ReLU gives; of the BatchNorm mean and deviation
    assert kept_for_backward(network, images, EngineConfig()) == (3 + 8 + 8) * pixels * floats + 2 * 8 * floats
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(("zero", "shares"), [(0, 3.0), (1, 2.5), (2, 2.0), (3, 1.5)])
def test_zero_divides_what_training_keeps_of_weights(zero: int, shares: float) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    config = RunConfig(engine=EngineConfig(zero=zero))  # type: ignore[arg-type]
    demand = training_demand(network, config, 2, on_gpu=True)
    assert demand.states == round(shares * sum(each.nbytes for each in network.parameters()))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--prune.ratio", "0.9", "--prune.min-share", "0.5"], "the largest ratio possible is 0.5"),
        (["--num-processes", "3"], "batch size 256 is not a multiple of 3 ranks"),
        (["--model.name", "vgg91"], "no model is called 'vgg91'"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    flags: list[str], part: str, netslim: Netslim, tiny: list[object], tmp_path: Path
) -> None:
    code, error = netslim("run", *tiny, *flags, "--dry-run")
    assert code == 2
    assert_one_line(error, part)
    assert not any(tmp_path.iterdir())


def test_a_dry_run_without_the_images_says_so_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.source", "folder", "--data.root", str(tmp_path / "none"), "--model.width", "0.0625", "--cpu"]
    assert dispatch(["run", "vgg19-cifar10", *flags, "--dry-run"]) == 0
    said = comments(capfd.readouterr().out)
    assert "warning: the run would be refused" in said
    assert str(tmp_path / "none") in said
    assert "memory of training" in said


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused_before_training(
    netslim: Netslim, tiny: list[object], disk: Disk
) -> None:
    disk.resize(1 << 20)  # the weights alone have some 0.15 MB
    wide = ["--model.width", 0.25, "--data.loader", "torch", "--data.num-workers", 0]
    code, error = netslim("sparsify", *tiny, "--run-dir", disk.path / "run", *wide)
    assert code == 2
    parts = re.search(
        r"about ([\d.]+) MiB are needed .*, ([\d.]+) MiB are free; free some, or use another --run-dir", error
    )
    assert parts is not None, error
    assert float(parts[1]) > 1 >= float(parts[2]) > 0.9
    assert f"{disk.path}/run" in error
    assert not list(disk.path.rglob("metrics.jsonl"))


def test_a_shared_memory_that_cannot_hold_the_workers_batches_is_refused_before_training(
    netslim: Netslim, tiny: list[object], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.resize(64 << 10)
    monkeypatch.setattr("netslim.data.batches.loaders._SHARED", str(disk.path))
    code, error = netslim("sparsify", *tiny, "--data.loader", "torch", "--data.num-workers", 2)
    assert code == 2
    assert_one_line(error, f"{disk.path}: No space left on device", "about 1.5 MiB", "0.1 MiB are free", "--shm-size")


def test_inspect_prints_the_map_of_a_preset(capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["inspect", "digits", "--model.width", "0.0625"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "vgg11 on images of 32x32"
    assert lines[2].split() == ["4", "4", "features.1", "features.0", "->", "features.4", "prunable"]
    assert lines[-3] == "172 of 172 channels are prunable"
    assert lines[-1].startswith("pull 1.55 = lambda 0.01 x")
    assert lines[-1].endswith("this lambda can bring gammas to zero in this schedule, by 3.1 times the median")


def test_inspect_predicts_before_training_that_lambda_is_too_small_and_names_one_that_suffices(
    capfd: pytest.CaptureFixture[str],
) -> None:
    weak = ["inspect", "digits", "--model.width", "0.0625", "--sparsity.weight", "1e-4"]
    assert dispatch(weak) == 0
    warning = capfd.readouterr().out.splitlines()[-1]
    assert warning.startswith("warning: pull 0.0155 = lambda 0.0001 x")
    (named,) = re.findall(r"(\S+) is the least lambda that can", warning)
    assert dispatch([*weak[:-1], named]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("pull 0.5")


def test_inspect_says_what_it_cannot_predict_without_images(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dispatch(["inspect", "vgg19-cifar10", "--model.width", "0.0625", "--data.root", str(tmp_path)]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert "depends on the number of training images: no cifar10 under" in last


def test_inspect_counts_single_scales_where_the_run_will(capfd: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["inspect", "preresnet164-cifar10", "--model.name", "preresnet20"]) == 0
    assert capfd.readouterr().out.splitlines()[-4:-2] == [
        "960 of 1360 channels are prunable",
        "1360 of 1360 channels are removable one by one",
    ]


def test_inspect_prints_the_map_of_a_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(name="vgg13", width=0.125))
    claim(tmp_path, "digits", config)
    assert dispatch(["inspect", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"{describe(config)}\n"


def test_inspect_names_the_file_of_a_run_that_it_cannot_read(netslim: Netslim, tmp_path: Path) -> None:
    code, error = netslim("inspect", tmp_path)
    assert code == 2
    assert_one_line(error, str(tmp_path), "no config.json")
    (tmp_path / "config.json").write_text('{"preset": "digits", "seed": -1}')
    code, error = netslim("inspect", tmp_path)
    assert code == 2
    assert_one_line(error, str(tmp_path / "config.json"), "seed is -1")


def test_sparsity_training_says_how_many_channels_are_prunable(
    tiny: list[object], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert dispatch([str(argument) for argument in ["sparsify", *tiny]]) == 0
    printed = capfd.readouterr().out
    assert "sparse: 172 of 172 channels are prunable\n" in printed
    assert "sparse: an epoch is 5 steps of 256 images, and leaves out 162 of the 1,442, others each time\n" in printed


@pytest.mark.parametrize("coupling", [pytest.param("group", marks=pytest.mark.slow), "select"])
def test_a_residual_network_is_slimmed_end_to_end_under_either_coupling(
    coupling: str, netslim: Netslim, tiny: list[object]
) -> None:
    flags = ["--model.name", "preresnet20", "--model.width", 0.25, "--prune.coupling", coupling, "--prune.ratio", 0.5]
    assert netslim("run", *tiny, *flags)[0] == 0


def test_a_network_without_batch_norm_is_refused(netslim: Netslim, tiny: list[object]) -> None:
    code, error = netslim("run", *tiny, "--model.name", "squeezenet1_1", "--model.width", 1, "--data.size", 32)
    assert code == 2
    assert "no BatchNorm" in error


@pytest.mark.parametrize(
    ("count", "before", "after"),
    [
        (
            138,
            r"reconstruct leaves \d of 9 layers as they are: .* weights for each output, more than 138 images",
            "of 9",
        ),
        (
            12,
            "cut networks will not be repaired: a repair needs at least 16 images .* 12 are given",
            "left as it was cut",
        ),
    ],
)
def test_a_run_with_few_training_images_ends_well_and_says_before_it_trains_what_repair_will_leave(
    count: int,
    before: str,
    after: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # for the order of what they say
    flags = [str(flag) for flag in flags_of_few(tmp_path, count)]
    assert dispatch(["inspect", *flags]) == 0
    assert re.search(f"warning: {before}", capfd.readouterr().out)
    assert dispatch(["run", *flags]) == 0
    printed = capfd.readouterr().out
    said, trained = re.search(f"sparse: warning: {before}", printed), re.search("sparse: epoch 1/1", printed)
    assert said is not None
    assert trained is not None
    assert said.start() < trained.start()
    assert len(re.findall(f"warning: {before}", printed)) == 1
    assert "sparse: warning: each BatchNorm normalises by 4 images (batch 4)" in printed
    assert re.search(f"repair-0.50: .*{after}", printed)
    rows = {row["stage"]: row for row in read_rows(tmp_path / "run")}
    assert rows["finetuned"]["accuracy"] >= 0
    assert dispatch(["inspect", str(tmp_path / "run"), "--inspect.ratios", "0.5"]) == 0
    (row,) = json.loads((tmp_path / "run" / "inspect.json").read_text())["ratios"]
    assert row["repaired"] == rows["repaired"]["accuracy"]


def test_sixteen_calibration_images_are_enough_for_a_repair_at_maps_of_one_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [str(flag) for flag in (*flags_of_few(tmp_path, 40), "--repair.images", 16, "--repair.no-auto")]
    assert dispatch(["run", *flags]) == 0
    assert "met a chunk of a single value for each channel" in capfd.readouterr().out
