"""The main job as users start it: two processes through Accelerate's launcher, and the files they leave."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from slurm_cluster import wait_until
from test_launch_cli import Netslim
from whole_run import ONE_RATIO, SCRIPT, SHORT, STAGES, alive, call, results, stages


@pytest.fixture(scope="module")
def flags(data_cache: Path) -> list[object]:
    return [*SHORT, *ONE_RATIO, "--data.cache", data_cache, "--record.wandb", "disabled"]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, flags: list[object]) -> Path:
    """The same under the user's own `accelerate launch`, which is not told that there is no GPU."""
    directory = tmp_path_factory.mktemp("second") / "run"
    launcher = [SCRIPT.with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    recipe = ["-m", "netslim.launch.recipe", "digits", "--run-dir", directory, *flags]
    done = call(*launcher, *recipe, *(["--no-cpu"] if not torch.cuda.is_available() else []))
    assert done.returncode == 0, done.stderr
    why = "netslim: warning: computes on the CPU: torch finds no GPU"
    assert done.stderr.count(why) == (not torch.cuda.is_available())
    return directory


def test_results_name_the_processes_the_loader_and_every_stage(whole_run: Path) -> None:
    values = results(whole_run)
    about = {key: values[key] for key in ("preset", "world_size", "loader", "device", "engine")}
    assert about == {"preset": "digits", "world_size": 2, "loader": "ffcv", "device": "cpu", "engine": "ddp"}
    assert [(row["stage"], row["ratio"]) for row in values["rows"]] == [
        ("sparse", 0.0),
        ("cut", 0.5),
        ("repaired", 0.5),
        ("finetuned", 0.5),
        ("cut", 0.9),
        ("repaired", 0.9),
        ("finetuned", 0.9),
    ]


def test_every_row_has_every_figure_and_smaller_networks_cost_less(whole_run: Path) -> None:
    rows = results(whole_run)["rows"]
    assert all(row[key] is not None for row in rows for key in ("accuracy", "params", "macs", "file_mb", "seconds"))
    for key in ("params", "macs", "file_mb"):
        assert rows[0][key] > rows[1][key] == rows[2][key] == rows[3][key] > rows[4][key]


def test_two_runs_with_the_same_seed_end_with_the_same_bytes_under_either_launcher(
    whole_run: Path, second: Path
) -> None:
    for stage in stages(0.5):
        weights = [(directory / stage / "weights.safetensors").read_bytes() for directory in (whole_run, second)]
        assert weights[0] == weights[1], stage


def test_each_stage_leaves_weights_configuration_and_metrics_of_every_epoch(whole_run: Path) -> None:
    for stage, epochs in (("sparse", 3), ("finetune-0.50", 1)):
        lines = [json.loads(line) for line in (whole_run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
        assert json.loads((whole_run / stage / "config.json").read_text())["sparsify"]["epochs"] == 3
        last = json.loads((whole_run / stage / "metrics.json").read_text())
        assert last["accuracy"] == lines[-1]["accuracy"]


def test_a_pruned_model_has_its_plan_and_the_proof_of_the_cut(whole_run: Path) -> None:
    plan = json.loads((whole_run / "prune-0.50" / "plan.json").read_text())
    metrics = json.loads((whole_run / "prune-0.50" / "metrics.json").read_text())
    assert plan["num_removed"] == metrics["num_removed"] == metrics["num_channels"] // 2
    assert 0 <= metrics["difference_from_masked"] <= 1e-5


def test_wandb_has_one_offline_run_for_each_stage(whole_run: Path) -> None:
    assert len(list((whole_run / "wandb").glob("offline-run-*/*.wandb"))) == len(STAGES)


def test_a_second_call_returns_what_is_there_and_another_ratio_starts_from_the_same_sparse_model(
    whole_run: Path, flags: list[object], netslim: Netslim, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    before = (run / "sparse" / "weights.safetensors").stat().st_mtime_ns
    command = ["prune", "digits", "--run-dir", run, *flags, "--prune.ratio", 0.3, "--num-processes", 1]
    assert netslim(*command)[0] == 0
    assert (run / "sparse" / "weights.safetensors").stat().st_mtime_ns == before
    assert [row["ratio"] for row in results(run)["rows"] if row["stage"] == "cut"] == [0.3, 0.5, 0.9]


def test_a_damaged_artefact_ends_both_ranks_with_one_line_and_code_2(second: Path, flags: list[object]) -> None:
    weights = second / "sparse" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = call(SCRIPT, "prune", "digits", "--run-dir", second, *flags, "--prune.ratio", "0.4")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("netslim: ")]
    assert len(lines) == 1, done.stderr
    assert str(weights) in lines[0]
    assert "Traceback" not in done.stderr


def test_a_full_disk_ends_both_ranks_and_leaves_no_stage_that_looks_complete(
    full_disk: Path, flags: list[object]
) -> None:
    done = call(SCRIPT, "run", "digits", "--run-dir", full_disk, *flags)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("netslim: ")]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert not list(full_disk.glob("*/metrics.json"))


def test_an_interrupt_ends_the_launcher_and_all_its_processes(tmp_path: Path, flags: list[object]) -> None:
    arguments = [SCRIPT, "run", "digits", "--run-dir", tmp_path, *flags, "--sparsify.epochs", 1000]
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
        start_new_session=True,
    )
    begun = tmp_path / "sparse" / "metrics.jsonl"
    assert wait_until(lambda: begun.exists() or process.poll() is not None, 600)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert wait_until(lambda: not alive(tmp_path), 300), alive(tmp_path)


def test_bf16_accumulation_clipping_proximal_steps_and_the_torch_loader_run_together(
    tmp_path: Path, flags: list[object]
) -> None:
    choices = ["--engine.precision", "bf16", "--engine.accumulation", 2, "--sparsify.clip", 1, "--finetune.clip", 1]
    choices += ["--sparsity.method", "proximal", "--data.loader", "torch", "--data.num-workers", 0]
    choices += ["--repair.steps", "recalibrate", "--repair.images", 256]
    done = call(SCRIPT, "run", "digits", "--run-dir", tmp_path / "run", *flags, *choices)
    assert done.returncode == 0, done.stderr
    values = results(tmp_path / "run")
    assert (values["loader"], values["world_size"], len(values["rows"])) == ("torch", 2, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "width", "coupling"),
    [("preresnet20", 0.5, "select"), ("densenet40", 0.5, "select"), ("resnet18", 1, "group")],
)
def test_coupled_networks_are_slimmed_in_two_processes_and_learn(
    name: str, width: float, coupling: str, tmp_path: Path, data_cache: Path
) -> None:
    choices = ["--model.name", name, "--model.width", width, "--prune.coupling", coupling, "--prune.ratio", 0.5]
    choices += ["--sparsify.epochs", 6, "--finetune.epochs", 3, "--sparsity.weight", 1e-3]
    choices += ["--data.size", 16, "--data.cache", data_cache]
    directory = tmp_path / "run"
    arguments = ["run", "digits", "--run-dir", directory, *choices, "--record.wandb", "disabled"]
    done = call(SCRIPT, *arguments, timeout=1700)
    print(f"{name}\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    values = results(directory)
    sparse, cut, _, finetuned = values["rows"]
    assert (values["world_size"], finetuned["stage"]) == (2, "finetuned")
    metrics = json.loads((directory / "prune-0.50" / "metrics.json").read_text())
    assert metrics["num_removed"] == metrics["num_channels"] // 2
    assert metrics["difference_from_masked"] <= 1e-5
    assert cut["params"] == finetuned["params"] < sparse["params"]
    assert finetuned["accuracy"] > 0.5  # ten classes
