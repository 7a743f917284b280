"""A grid of runs on this machine: each sparse model is trained once, and a member that fails is tried again alone."""

import json
from pathlib import Path

import pytest
from test_launch_cli import Netslim, assert_one_line
from whole_run import SCRIPT, call

from netslim.launch.cli import dispatch
from netslim.launch.compare.entries import gather
from netslim.launch.presets import digits
from netslim.launch.sweep.command import SweepConfig, grid, new_sweep
from netslim.launch.sweep.grid import Member, Sweep

LONE = "lambda-0_seed-0_ratio-0.90"


@pytest.fixture(scope="module")
def flags(data_cache: Path) -> list[object]:
    short = ["--sparsify.epochs", 1, "--finetune.epochs", 1, "--model.width", 0.125, "--data.size", 16]
    quick = ["--repair.steps", "recalibrate", "--repair.images", 256, "--data.loader", "torch", "--data.num-workers", 0]
    return [*short, *quick, "--data.cache", data_cache, "--num-processes", 1, "--record.wandb", "disabled"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, flags: list[object]) -> Path:
    """Two lambdas at two ratios, one of which cannot write what it has pruned."""
    directory = tmp_path_factory.mktemp("sweep") / "grid"
    obstacle = directory / LONE / "prune-0.90"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    done = call(
        *(SCRIPT, "sweep", "digits", "--run-dir", directory),
        *("--weights", 0, "1e-2", "--ratios", 0.5, 0.9, *flags),
    )
    assert done.returncode == 1, done.stderr
    assert f"netslim: not done: {LONE}; to try again: netslim sweep {directory}" in done.stderr
    assert done.stdout.count("sparse: epoch 1/1") == 2
    assert "5 of 6 done" in done.stdout
    obstacle.unlink()
    return directory


def weights(directory: Path, stage: str) -> bytes:
    return (directory / stage / "weights.safetensors").read_bytes()


def test_a_member_is_what_the_run_of_its_lambda_and_ratio_alone_would_be(
    sweep: Path, flags: list[object], tmp_path: Path, netslim: Netslim
) -> None:
    alone = ["--sparsity.weight", "1e-2", "--prune.ratio", 0.5]
    code, error = netslim("run", "digits", "--run-dir", tmp_path / "run", *alone, *flags)
    assert code == 0, error
    member = sweep / "lambda-0.01_seed-0_ratio-0.50"
    for stage in ("sparse", "prune-0.50", "repair-0.50", "finetune-0.50"):
        assert weights(member, stage) == weights(tmp_path / "run", stage), stage


def test_a_member_that_failed_says_why_and_is_run_again_alone(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["sweep", "--status", str(sweep)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[0] == LONE)
    assert "failed: " in line
    assert "prune-0.90" in line
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("weights.safetensors")}
    again = call(SCRIPT, "sweep", sweep)
    assert again.returncode == 0, again.stderr
    assert "6 of 6 done" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in sweep.rglob("weights.safetensors")}
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in after.keys() - before} == {"prune-0.90", "repair-0.90", "finetune-0.90"}


def test_a_sweep_whose_images_are_missing_says_failed_for_every_member(
    netslim: Netslim, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = ["--data.source", "folder", "--data.root", tmp_path / "nowhere"]
    grid = ["--run-dir", tmp_path / "grid", "--weights", 0, "1e-4", "--ratios", 0.5]
    code, error = netslim("sweep", "digits", *grid, *there, "--num-processes", 1)
    assert code == 2
    assert_one_line(error, str(tmp_path / "nowhere"))
    assert dispatch(["sweep", "--status", str(tmp_path / "grid")]) == 0
    _, *members, last = capfd.readouterr().out.splitlines()
    assert last.startswith("0 of 4 done")
    assert len(members) == 4
    for line in members:
        assert f"failed: {error.removeprefix('netslim: ').strip()}" in line


def test_what_waits_for_a_sparse_model_that_failed_has_failed_with_it_until_that_is_tried_again(tmp_path: Path) -> None:
    members = grid(SweepConfig(weights=(0.0, 1e-4), ratios=(0.5,)), digits())
    sweep = Sweep(tmp_path, "digits", digits(), members, [], {})
    sweep.write()
    sweep.make(members)
    sweep.mark_failed(members[0], "no memory")
    want = ["failed: no memory", f"failed: its sparse model, {members[0].name}, did", "waiting", "waiting"]
    assert [sweep.state(member, {}) for member in members] == want
    assert [entry.state for entry in gather([tmp_path]).entries] == [*want[:2], "waiting"]
    sweep.make(members)
    assert {sweep.state(member, {}) for member in members} == {"waiting"}


def test_the_index_says_what_is_in_the_sweep(sweep: Path) -> None:
    index = json.loads((sweep / "sweep.json").read_text())
    assert index["preset"] == "digits"
    assert [(m["weight"], m["seed"], m["ratio"]) for m in index["members"]] == [
        *((0.0, 0, None), (0.0, 0, 0.5), (0.0, 0, 0.9)),
        *((0.01, 0, None), (0.01, 0, 0.5), (0.01, 0, 0.9)),
    ]
    assert {m["name"] for m in index["members"]} <= {path.name for path in sweep.iterdir()}


def test_the_command_with_more_values_adds_to_the_grid(sweep: Path, flags: list[object]) -> None:
    before = Sweep.read(sweep).members
    same = [str(flag) for flag in ("--run-dir", sweep, *flags)]
    after = new_sweep("digits", SweepConfig(weights=(0.0,), ratios=(0.5, 0.7)), same).members
    assert after == [*before, Member(0.0, 0, 0.7)]
    with pytest.raises(ValueError, match=r"another configuration: sparsify\.lr was 0\.1, now 0\.3"):
        new_sweep("digits", SweepConfig(), [*same, "--sparsify.lr", "0.3"])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--weights"], ["--weights has no values", "no members"]),
        (["--weights", "1e-4", "0.0001"], ["--weights names 0.0001 twice"]),
        (["--ratios", "0.5", "0.50"], ["--ratios names 0.5 twice"]),
        (["--seeds", *map(str, range(5000))], ["15,000 members", "--yes"]),
        (["--ratios", "1"], ["ratios", "1"]),
        (["--sparsity.weight", "1"], ["--sparsity.weight is what a sweep varies", "--weights"]),
        (["--seed=1"], ["--seed=1", "--seeds"]),
        (["--partition", "gpu"], ["--partition=gpu is for jobs of SLURM", "--slurm"]),
        (["--limit", "2"], ["--limit is for jobs of SLURM", "--slurm"]),
        (["--slurm", "--dependency", "afterok:1"], ["--dependency"]),
        (["--status"], ["is no sweep", "sweep.json"]),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_written(
    flags: list[str], parts: list[str], netslim: Netslim, tmp_path: Path
) -> None:
    code, said = netslim("sweep", "digits", "--run-dir", tmp_path / "sweep", *flags)
    assert code == 2
    assert_one_line(said, *parts)
    assert not (tmp_path / "sweep").exists()


def test_the_grid_of_a_known_sweep_is_changed_by_its_whole_command_alone(sweep: Path, netslim: Netslim) -> None:
    code, said = netslim("sweep", sweep, "--ratios", 0.7)
    assert code == 2
    assert_one_line(said, "--ratios would change the sweep", "whole command")


def test_a_directory_without_an_index_is_no_sweep(netslim: Netslim, tmp_path: Path) -> None:
    code, said = netslim("sweep", tmp_path)
    assert code == 2
    assert_one_line(said, f"{tmp_path} is no sweep", "sweep.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"members": 3}', '{"preset": "digits", "members": [{}], "jobs": {}}'])
def test_a_damaged_index_is_named(text: str, netslim: Netslim, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    code, said = netslim("sweep", "--status", tmp_path)
    assert code == 2
    assert_one_line(said, str(tmp_path / "sweep.json"), "damaged")


def test_names_of_members_are_short_and_tell_all_values_apart() -> None:
    values = (0.0, 1e-05, 1e-4, 0.1, 0.1 + 2**-54, 1 / 3)
    members = grid(SweepConfig(weights=values, ratios=(0.5, 0.25, 1 / 3), seeds=(0, 1)), digits())
    assert len({member.name for member in members}) == len(members) == 6 * 2 * 4
    assert Member(1e-05, 0, 0.5).name == "lambda-1e-05_seed-0_ratio-0.50"
