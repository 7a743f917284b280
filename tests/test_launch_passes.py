"""From one sparse model to slim ones in several ways: more than one pass, and other starts of fine-tuning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from netslim.launch.run.stage import Pass, passes_to
from netslim.prune import load_plan

FLAGS = [
    *("--data.size", 16, "--data.batch-size", 256, "--model.width", 0.125, "--num-processes", 1),
    *("--sparsify.epochs", 1, "--finetune.epochs", 1, "--prune.ratio", 0.5, "--repair.images", 512),
    *("--record.wandb", "disabled"),
]


def rows(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "results.json").read_text())["rows"]
    return found


def test_each_pass_takes_the_same_share_of_what_is_left_and_the_last_reaches_the_ratio() -> None:
    first, second, third = passes_to(0.488, 3)
    assert first.share == pytest.approx(0.2)
    assert second.share == pytest.approx(1 - 0.8**2)
    assert third.share == 0.488
    assert third.before == second


@pytest.mark.parametrize("coupling", [pytest.param("group", marks=pytest.mark.slow), "select"])
def test_two_passes_end_at_the_ratio_and_never_bring_a_channel_back(netslim, tmp_path, data_cache, coupling) -> None:
    command = ["run", "digits", "--run-dir", tmp_path, "--data.cache", data_cache, *FLAGS, "--model", "preresnet20"]
    code, error = netslim(*command, "--model.width", 0.25, "--prune.passes", 2, "--prune.coupling", coupling)
    assert code == 0, error
    stages = [(row["stage"], row["ratio"]) for row in rows(tmp_path)]
    between = Pass(0.5, 1, 2).share
    assert stages == [
        ("sparse", 0.0),
        ("sparse", between),
        ("cut", between),
        ("repaired", between),
        ("cut", 0.5),
        ("repaired", 0.5),
        ("finetuned", 0.5),
    ]
    once, again, twice = (
        load_plan(tmp_path / name) for name in ("prune-0.50-pass-1", "sparse-0.50-pass-2", "finetune-0.50")
    )
    assert again.digest == once.digest
    assert all(set(twice.kept[name]) <= set(kept) for name, kept in once.kept.items())
    assert twice.num_asked == twice.num_channels // 2


def test_a_run_can_choose_by_what_reconstruction_restores(netslim, tmp_path, data_cache) -> None:
    command = ["run", "digits", "--run-dir", tmp_path, "--data.cache", data_cache, *FLAGS, "--repair.images", 1024]
    code, error = netslim(*command, "--prune.score", "reconstruction", "--prune.ratio", 0.3, 0.5)
    assert code == 0, error
    plans = [load_plan(tmp_path / f"prune-{ratio}") for ratio in ("0.30", "0.50")]
    assert [plan.rules.score for plan in plans] == ["reconstruction"] * 2
    assert all(set(plans[1].kept[name]) <= set(kept) for name, kept in plans[0].kept.items())
    assert netslim("inspect", tmp_path, "--inspect.ratios", 0.5)[0] == 0
    (tried,) = json.loads((tmp_path / "inspect.json").read_text())["ratios"]
    assert tried["params"] == rows(tmp_path)[-1]["params"]


def test_one_stage_of_several_passes_is_refused(netslim, tmp_path) -> None:
    code, error = netslim("prune", "digits", "--run-dir", tmp_path / "run", "--prune.passes", 2)
    assert (code, (tmp_path / "run").exists()) == (2, False)
    assert "prune.passes is 2, in which the stages take turns; use netslim run, or one pass" in error


def test_fine_tuning_starts_from_the_repaired_the_cut_and_the_new_network(netslim, tmp_path, data_cache) -> None:
    command = ["run", "digits", "--run-dir", tmp_path, "--data.cache", data_cache, *FLAGS]
    code, error = netslim(*command)
    assert code == 0, error
    slim = (tmp_path / "finetune-0.50" / "weights.safetensors").stat().st_mtime_ns
    code, error = netslim(*command, "--finetune.start", "slim", "cut", "scratch")  # the field is free to change
    assert code == 0, error
    assert (tmp_path / "finetune-0.50" / "weights.safetensors").stat().st_mtime_ns == slim
    assert [row["stage"] for row in rows(tmp_path)] == [
        *("sparse", "cut", "repaired", "finetuned", "finetuned_cut", "scratch")
    ]
    assert len({row["accuracy"] for row in rows(tmp_path)[3:]}) > 1
    plans = [load_plan(tmp_path / f"{stage}-0.50").digest for stage in ("finetune", "finetune-cut", "scratch")]
    assert len(set(plans)) == 1


def test_what_no_stage_has_read_yet_may_still_change(netslim, tmp_path, data_cache) -> None:
    flags = ["--run-dir", tmp_path, "--data.cache", data_cache, *FLAGS]
    assert netslim("sparsify", "digits", *flags)[0] == 0
    assert netslim("prune", "digits", *flags, "--prune.min-channels", 3, "--repair.images", 64)[0] == 0
    code, error = netslim("prune", "digits", *flags, "--prune.min-channels", 2)
    assert (code, "prune.min_channels was 3, now 2" in error) == (2, True)
    flags += ["--prune.min-channels", 3]
    assert netslim("repair", "digits", *flags)[0] == 0  # with the default's 512 images
    code, error = netslim("repair", "digits", *flags, "--repair.images", 640)
    assert (code, "repair.images was 512, now 640" in error) == (2, True)
    assert netslim("finetune", "digits", *flags, "--finetune.lr", 0.02)[0] == 0
    code, error = netslim("finetune", "digits", *flags, "--finetune.lr", 0.01)
    assert (code, "finetune.lr was 0.02, now 0.01" in error) == (2, True)


def test_a_copied_sparse_model_is_pruned_by_other_rules_and_taken_for_no_other_training(
    netslim, tmp_path, data_cache
) -> None:
    one, other = (["digits", "--run-dir", tmp_path / name, "--data.cache", data_cache, *FLAGS] for name in "ab")
    assert netslim("sparsify", *one)[0] == 0
    shutil.copytree(tmp_path / "a" / "sparse", tmp_path / "b" / "sparse")
    code, error = netslim("prune", *other, "--sparsity.weight", 0.5)
    assert (code, "sparsity.weight was 0.01, now 0.5" in error) == (2, True)
    assert netslim("prune", *one, "--prune.score", "gamma_norm")[0] == 0
    assert netslim("prune", *other)[0] == 0
    kept = [load_plan(tmp_path / name / "prune-0.50").kept for name in "ab"]
    assert kept[0] != kept[1]


def test_a_field_that_an_older_run_did_not_have_counts_as_its_default(netslim, tmp_path, data_cache) -> None:
    flags = ["--run-dir", tmp_path, "--data.cache", data_cache, *FLAGS]
    assert netslim("sparsify", "digits", *flags)[0] == 0
    values = json.loads((tmp_path / "config.json").read_text())
    del values["prune"]["passes"], values["repair"]["auto"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert netslim("prune", "digits", *flags)[0] == 0


def test_a_start_named_twice_is_refused(netslim, tmp_path) -> None:
    code, error = netslim("run", "digits", "--run-dir", tmp_path / "run", "--finetune.start", "cut", "cut")
    assert code == 2
    assert "finetune.start names a start twice" in error
