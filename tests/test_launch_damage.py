"""Damaged, foreign and malicious files in a run directory: one line, code 2, and no stage that looks complete."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_launch_cli import Netslim, assert_one_line, smallest
from test_prune_artefact import Malicious
from test_prune_nets import Residual

from netslim.launch.cli import dispatch
from netslim.prune import load_plan, save
from netslim.train import ModelConfig, build_model

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """A run with its sparse model, and one that is pruned and repaired."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    flags = [str(flag) for flag in smallest(directory, data_cache)]
    assert dispatch(["sparsify", *flags]) == 0
    for command in ("prune", "repair"):
        assert dispatch([command, *flags, "--prune.ratio", "0.5"]) == 0
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def assert_refused(netslim: Netslim, command: list[object], stage: Path, *parts: str) -> None:
    code, error = netslim(*command)
    assert code == 2
    assert_one_line(error, *parts)
    assert not (stage / "weights.safetensors").exists()
    assert not (stage / "metrics.json").exists()


def spoil_a_gamma(stage: Path) -> None:
    path = stage / "weights.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
    gamma = next(key for key, value in tensors.items() if key.endswith("running_var") and value.numel() > 4)
    tensors[gamma.replace("running_var", "weight")][3] = torch.nan
    safetensors.torch.save_file(tensors, path, about)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_plan(stage: Path) -> None:
    content = json.loads((stage / "plan.json").read_text())
    content["ratio"] = 0.25
    (stage / "plan.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        pytest.param(lambda sparse: halve(sparse / "weights.safetensors"), ["or is damaged"], id="half the weights"),
        pytest.param(lambda sparse: (sparse / "weights.safetensors").unlink(), ["no weights at"], id="no weights"),
        pytest.param(spoil_a_gamma, ["has gammas that are NaN or infinite"], id="a gamma that is NaN"),
        pytest.param(
            lambda sparse: save(Residual(), None, sparse),
            ["missing (features.0.weight, ", "unexpected (", ", ...)"],
            id="another architecture",
        ),
        pytest.param(
            lambda sparse: save(build_model(ModelConfig(name="vgg11", width=0.125), 10, seed=0), None, sparse),
            ["of another shape (", "instead of"],
            id="another width",
        ),
        pytest.param(
            lambda sparse: shutil.copy(sparse.parent / "prune-0.50" / "plan.json", sparse),
            ["are not of one save"],
            id="the plan of another stage",
        ),
        pytest.param(
            lambda sparse: save(Residual(), load_plan(sparse.parent / "prune-0.50"), sparse),
            ["missing (features.0.weight, ", "unexpected (", ", ...)"],
            id="a pruned network of another architecture",
        ),
    ],
)
def test_a_damaged_sparse_model_is_not_pruned(
    damage: Damage, parts: list[str], run: Path, netslim: Netslim, data_cache: Path
) -> None:
    damage(run / "sparse")
    command = ["prune", *smallest(run, data_cache), "--prune.ratio", 0.3]
    assert_refused(netslim, command, run / "prune-0.30", *parts)


@pytest.mark.parametrize(
    ("command", "read", "made"), [("repair", "prune-0.50", "repair-0.50"), ("finetune", "repair-0.50", "finetune-0.50")]
)
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        pytest.param(lambda pruned: halve(pruned / "weights.safetensors"), ["or is damaged"], id="half the weights"),
        pytest.param(lambda pruned: halve(pruned / "plan.json"), ["plan.json: not a plan"], id="half the plan"),
        pytest.param(edit_plan, ["plan.json", "changed after it was written"], id="an edited plan"),
        pytest.param(lambda pruned: (pruned / "plan.json").unlink(), ["are not of one save"], id="no plan"),
        pytest.param(
            lambda pruned: shutil.copy(pruned.parent / "sparse" / "weights.safetensors", pruned),
            ["are not of one save"],
            id="the weights of another stage",
        ),
    ],
)
def test_a_damaged_pruned_model_is_neither_repaired_nor_trained(
    damage: Damage,
    parts: list[str],
    command: str,
    read: str,
    made: str,
    run: Path,
    netslim: Netslim,
    data_cache: Path,
) -> None:
    damage(run / read)
    shutil.rmtree(run / made, ignore_errors=True)
    assert_refused(netslim, [command, *smallest(run, data_cache), "--prune.ratio", 0.5], run / made, *parts)


def test_a_pickle_among_the_stages_is_never_executed(
    run: Path, netslim: Netslim, data_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (run / "sparse" / "weights.safetensors").write_bytes(pickle.dumps(Malicious()))
    command = ["prune", *smallest(run, data_cache), "--prune.ratio", 0.3]
    assert_refused(netslim, command, run / "prune-0.30", "is not a safetensors file")
    assert not (tmp_path / "executed").exists()


def test_a_ratio_that_empties_layers_is_refused(run: Path, netslim: Netslim, data_cache: Path) -> None:
    command = ["prune", *smallest(run, data_cache), "--prune.ratio", 0.99]
    assert_refused(netslim, command, run / "prune-0.99", "ratio 0.99", "the largest ratio possible is 0.9")
