"""The house itself: rooms that a stranger finds the way in, and the names that users hold on to."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("base", "train", "prune", "data", "launch")
FILES = sorted(path for room in (*ROOMS, "door") for path in (ROOT / room).rglob("*.py"))
SUB_ROOMS = sorted(path.parent for path in FILES if path.name == "__init__.py" and path.parent.parent != ROOT)
PUBLIC = {
    "netslim.data": """
        CalibrationLoader DataConfig DataInfo Loaders Shard check_batch_size open_calibration
        open_loaders open_source prepare prepared
    """,
    "netslim.train": """
        CheckpointConfig EngineConfig Evaluation FitConfig GammaPenalty LostRankError ModelConfig
        Preempted Record RecordConfig Runtime Saver Snapshot SparsityConfig Store build_model
        check_devices check_model describe_pull evaluate fit gamma_summary learning_rate
        make_optimizer model_names num_gpus soft_threshold_ travel weights_digest
    """,
    "netslim.prune": """
        Calibration ChannelMap Chunk Cost Coupling Format Gammas Normalise Origin Plan Repair RepairConfig
        Rules absorb carry choose_zeros chunk_size cost cut embed export folded gammas largest_difference
        latency load load_origin load_plan make_plan map_channels masked norm_of open_gammas plan_network prove repair
        save score_channels slim
    """,
    "netslim.train.models": """
        VGG DenseNet ModelConfig PreResNet build_model build_network check_model initialise is_own
    """,
}


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in PUBLIC.items() for name in names.split()])
def test_a_public_name_stays_where_it_was(module: str, name: str) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, name)
    assert name in found.__all__


def test_no_folder_has_more_than_a_dozen_files() -> None:
    counts = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in FILES}}
    assert len(counts) > len(ROOMS)
    assert {str(folder): count for folder, count in counts.items() if count > 12} == {}


def test_no_file_is_longer_than_300_lines_and_the_recipe_fits_on_a_screen() -> None:
    assert {str(path): lines_of(path) for path in FILES if lines_of(path) > 300} == {}
    assert lines_of(ROOT / "launch" / "run" / "recipe.py") < 120


def test_the_room_below_all_others_is_tiny() -> None:
    assert sum(map(lines_of, (ROOT / "base").glob("*.py"))) < 180


@pytest.mark.parametrize("door", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in SUB_ROOMS])
def test_the_door_of_a_sub_room_says_what_it_is_for_and_names_what_it_gives(door: Path) -> None:
    module = ast.parse((door / "__init__.py").read_text(encoding="utf-8"))
    said = ast.get_docstring(module) or ""
    assert 2 <= said.count(". ") + said.count(".\n") + said.endswith(".") <= 4, said
    given = importlib.import_module(f"netslim.{'.'.join(door.relative_to(ROOT).parts)}").__all__
    assert len(given) == len(set(given)) > 0


def test_every_package_is_installed() -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    listed = setup.partition("packages =\n")[2].partition("package_dir")[0].split()
    there = {".".join(("netslim", *path.parent.relative_to(ROOT).parts)) for path in FILES}
    assert sorted(listed) == sorted((there - {"netslim.door"}) | {"netslim"})
