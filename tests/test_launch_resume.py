"""A run that is taken up again from what it cannot use says so in one line, and leaves everything as it was."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Disk
from test_launch_cli import Netslim, assert_one_line, smallest
from test_train_resume import lines

from netslim.data import DataConfig
from netslim.launch.cli import dispatch
from netslim.launch.config import RunConfig
from netslim.launch.mistakes import MISTAKE, PREEMPTED, guarded
from netslim.launch.run import recipe
from netslim.launch.run.directory import PREEMPTED_MARK
from netslim.launch.run.runner import Made
from netslim.launch.run.stage import Command
from netslim.launch.run.starting import open_job
from netslim.train.loop import Training
from netslim.train.saved.checkpoint import read

STOP, LAST = 3, 10  # the step after which runs are stopped, and that at which they end
Damage = Callable[[Path], object]


def flags(directory: Path, data_cache: Path) -> list[object]:
    """Two epochs of five steps each, with a checkpoint after each step."""
    every = ["--sparsify.epochs", 2, "--sparsity.weight", 0.2, "--checkpoint.steps", 1, "--prune.ratio", 0.5]
    return [*smallest(directory, data_cache), *every]


def stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let the run that follows be told to stop while it computes this step."""
    real, calls = Training.forward_backward, 0

    def forward_backward(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    patch.setattr(Training, "forward_backward", forward_backward)


def stopped(command: list[object], step: int = STOP) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        stop_after(step, patch)
        assert guarded(lambda: dispatch([str(argument) for argument in command])) == PREEMPTED


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert dispatch([str(argument) for argument in ["sparsify", *flags(directory, data_cache)]]) == 0
    return directory


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """A run that was told to stop in its first epoch; it holds two checkpoints."""
    directory = tmp_path_factory.mktemp("interrupted") / "run"
    stopped(["sparsify", *flags(directory, data_cache)])
    return directory


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be gone on with."""
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    edit_config(run, run_dir=str(run))
    return run


@pytest.fixture
def command(run: Path, data_cache: Path) -> list[object]:
    """The same command again."""
    return ["sparsify", *flags(run, data_cache)]


def edit_config(run: Path, **values: Any) -> None:
    config = run / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}, indent=2))


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "sparse" / "checkpoints").iterdir())


def content(directory: Path) -> dict[str, bytes | None]:
    """Of a run's directory, but for what says how the last command ended, and that one is at work."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if path.name not in (PREEMPTED_MARK, ".lock")
    }


def assert_refused(netslim: Netslim, command: list[object], directory: Path, *parts: str) -> None:
    """One line, code 2, and nothing in the directory was changed, added or deleted."""
    before = content(directory)
    code, error = netslim(*command)
    assert code == MISTAKE
    assert_one_line(error, *parts)
    assert content(directory) == before


def assert_goes_on(netslim: Netslim, command: list[object], run: Path, undisturbed: Path) -> str:
    """The stage ends as the undisturbed one; returns what went to stderr."""
    code, error = netslim(*command)
    assert code == 0, error
    have, want = ((directory / "sparse" / "weights.safetensors").read_bytes() for directory in (run, undisturbed))
    assert have == want
    assert lines(run / "sparse") == lines(undisturbed / "sparse")
    return error


def test_a_run_that_was_stopped_goes_on_by_the_same_command(
    command: list[object], run: Path, undisturbed: Path, netslim: Netslim
) -> None:
    assert [path.name for path in checkpoints(run)] == ["step-00000002", "step-00000003"]
    assert assert_goes_on(netslim, command, run, undisturbed) == ""


OTHERS = {
    "another preset": (
        [
            *("vgg19-cifar10", "--model.name", "vgg11", "--model.width", 0.0625, "--data.source", "digits"),
            *("--data.size", 16, "--data.batch-size", 256, "--sparsify.epochs", 1, "--checkpoint.steps", 1),
            *("--record.wandb", "disabled", "--num-processes", 1),
        ],
        ["preset"],
    ),
    "another width": (["digits", "--model.width", 0.125], ["model.width"]),
    "another seed and learning rate": (["digits", "--seed", 3, "--sparsify.lr", 0.2], ["seed", "sparsify.lr"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints_of_another_run_are_refused_and_left_alone(
    name: str, command: list[object], run: Path, tmp_path: Path, data_cache: Path, netslim: Netslim
) -> None:
    (preset, *others), parts = OTHERS[name]
    common = flags(tmp_path / "other", data_cache)[1:] if preset == "digits" else []
    place = ["--run-dir", tmp_path / "other", "--data.cache", data_cache]
    stopped(["sparsify", preset, *common, *others, *place])
    shutil.rmtree(run / "sparse" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "sparse" / "checkpoints", run / "sparse" / "checkpoints")
    assert_refused(netslim, command, run, "is of another run: ", *parts, "use another --run-dir")


def test_checkpoints_of_another_ratio_and_another_plan_are_refused(
    undisturbed: Path, tmp_path: Path, data_cache: Path, netslim: Netslim
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    both = [*flags(run, data_cache), "--prune.ratio", 0.3, 0.5]
    for command in ("prune", "repair"):
        assert netslim(command, *both)[0] == 0
    stopped(["finetune", *flags(run, data_cache), "--prune.ratio", 0.3])
    shutil.copytree(run / "finetune-0.30", run / "finetune-0.50")
    again = ["finetune", *flags(run, data_cache), "--prune.ratio", 0.5]
    edit_config(run, prune={**json.loads((run / "config.json").read_text())["prune"], "ratio": [0.5]})
    assert_refused(netslim, again, run, "finetune-0.50", "is of another run: plan, ratio differ")


def make_newer(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "of a newer format": (make_newer, "has format 2, this netslim reads 1"),
    "empty": (empty, "manifest.json: No such file"),
}
for _name in ("tensors.safetensors", "values.json", "manifest.json"):
    DAMAGES[f"without {_name}"] = (lambda path, name=_name: (path / name).unlink(), f"{_name}: No such file")  # type: ignore[misc]
    DAMAGES[f"with half of {_name}"] = (lambda path, name=_name: halve(path / name), "is damaged: ")  # type: ignore[misc]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_newest_checkpoint_that_cannot_be_used_is_reported_and_the_one_before_used(
    name: str, command: list[object], run: Path, undisturbed: Path, netslim: Netslim
) -> None:
    damage, part = DAMAGES[name]
    damage(checkpoints(run)[-1])
    said = assert_goes_on(netslim, command, run, undisturbed)
    assert said.count("\n") == 1
    for each in ("sparse: warning: checkpoint", "step-00000003", part, "the checkpoint before it is used"):
        assert each in said


@pytest.mark.parametrize("name", DAMAGES)
def test_where_no_checkpoint_can_be_used_each_is_named_with_its_reason(
    name: str, command: list[object], run: Path, netslim: Netslim
) -> None:
    damage, part = DAMAGES[name]
    older, newer = checkpoints(run)
    damage(newer)
    damage(older)
    reasons = [older.name, newer.name, part, "none of the 2 checkpoints", "delete the directory to start anew"]
    assert_refused(netslim, command, run, *reasons)
    shutil.rmtree(older)
    assert_refused(netslim, command, run, newer.name, part, "none of the 1 checkpoints")


def test_every_field_that_differs_is_listed(command: list[object], run: Path, netslim: Netslim) -> None:
    changed = ["--seed", 3, "--sparsify.lr", 0.2, "--data.pad", 1, "--engine.accumulation", 2, "--prune.round-to", 8]
    assert_refused(
        netslim,
        [*command, *changed],
        run,
        *("seed was 0, now 3", "sparsify.lr was 0.1, now 0.2", "data.pad was 2, now 1"),
        *("engine.accumulation was 1, now 2", "prune.round_to was 1, now 8"),
    )


def test_fields_that_change_nothing_in_what_comes_out_may_be_changed(
    command: list[object], run: Path, undisturbed: Path, data_cache: Path, tmp_path: Path, netslim: Netslim
) -> None:
    cache = shutil.copytree(data_cache, tmp_path / "cache")
    changed = [
        *("--record.project", "other", "--record.tags", "a", "b", "--checkpoint.steps", 4, "--checkpoint.keep", 3),
        *("--checkpoint.minutes", 1, "--data.cache", cache, "--data.num-workers", 2, "--prune.ratio", 0.3, "--cpu"),
        *("--num-processes", 1),
    ]
    edit_config(run, num_processes=2, cpu=False)  # as if the run had been begun by two processes, on a GPU
    assert assert_goes_on(netslim, [*command, *changed], run, undisturbed) == ""


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(
    command: list[object], run: Path, netslim: Netslim
) -> None:
    assert_refused(netslim, [*command, "--num-processes", 3], run, "batch size 256 is not a multiple of 3 ranks", "try")


def size_of(directory: Path) -> int:
    """Bytes that the files of a directory take in a file system of pages, with a page for each directory."""
    return sum(4096 * (1 + -(-path.stat().st_size // 4096)) for path in directory.rglob("*"))


def test_a_disk_that_fills_up_during_a_checkpoint_loses_nothing(
    disk: Disk, undisturbed: Path, data_cache: Path, netslim: Netslim, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk.path / "run"
    command = ["sparsify", *flags(run, data_cache)]
    command[command.index("--checkpoint.steps") : command.index("--prune.ratio")] = []  # at the end of each epoch
    one = size_of(checkpoints(undisturbed)[-1])
    real = Training.train_epoch

    def shrinking(*arguments: Any) -> None:
        disk.resize(one + one // 2)
        real(*arguments)

    with monkeypatch.context() as patch:  # once the run has begun: before it would be refused
        patch.setattr(Training, "train_epoch", shrinking)
        code, error = netslim(*command)
    assert code == MISTAKE
    assert_one_line(error, "No space left")
    (left,) = checkpoints(run)
    assert read(left).step == LAST // 2
    disk.resize(64 << 20)
    assert assert_goes_on(netslim, command, run, undisturbed) == ""
    assert [line["step"] for line in lines(run / "sparse")] == [LAST // 2, LAST]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages in which a step was taken."""
    stages: list[str] = []
    real = Training.train_epoch

    def train_epoch(training: Training, *arguments: Any) -> None:
        stages.append(training.record.stage)
        real(training, *arguments)

    monkeypatch.setattr(Training, "train_epoch", train_epoch)
    return stages


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_run_directory_that_is_read_only_is_refused_before_training(
    is_begun: bool, disk: Disk, interrupted: Path, data_cache: Path, trained: list[str], netslim: Netslim
) -> None:
    run = disk.path / "run"
    if is_begun:
        shutil.copytree(interrupted, run)
    disk.mount("remount,ro")
    assert_refused(netslim, ["sparsify", *flags(run, data_cache)], disk.path, str(run), "Read-only file system")
    assert not trained


@pytest.mark.parametrize(
    ("command", "directory"),
    [
        ("repair", "repair-0.50"),
        pytest.param("prune", "prune-0.50", marks=pytest.mark.slow),
        pytest.param("finetune", "finetune-0.50", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_between_two_stages_costs_only_the_second(
    command: Command,
    directory: str,
    disk: Disk,
    undisturbed: Path,
    data_cache: Path,
    trained: list[str],
    netslim: Netslim,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = disk.path / "run"
    shutil.copytree(undisturbed, run)
    line = ["run", *flags(run, data_cache)]
    real = recipe.MAKE[command]

    def failing(*arguments: Any) -> Made:
        disk.fill()
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setitem(recipe.MAKE, command, failing)
        code, error = netslim(*line)
    assert code == MISTAKE
    assert_one_line(error, "No space left")
    assert "sparse" not in trained
    assert not (run / directory / "metrics.json").exists()
    (disk.path / "ballast").unlink()
    assert netslim(*line)[0] == 0
    assert "sparse" not in trained
    assert [path.name for path in run.rglob(".*")] == [".lock"]
    assert len(json.loads((run / "results.json").read_text())["rows"]) == 4


def test_ranks_of_any_launcher_that_do_not_divide_the_batch_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = RunConfig(data=DataConfig(batch_size=256), run_dir=tmp_path / "run")
    info: Any = None
    ranks: Any = SimpleNamespace(world_size=3, on_main=lambda work: work())
    with pytest.raises(ValueError, match="batch size 256 is not a multiple of 3 ranks"):
        open_job("digits", config, info, ranks)
    assert not (tmp_path / "run").exists()
