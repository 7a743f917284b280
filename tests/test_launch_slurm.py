"""Runs and sweeps as jobs of a real SLURM with two nodes."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster, slurm_cluster, wait_until
from test_launch_faults import assert_equal_runs
from whole_run import ONE_RATIO, SCRIPT, SHORT, results

TWO_NODES = ["--nodes", 2, "--processes-per-node", 1]
QUICK = ["--repair.steps", "recalibrate", "--repair.images", 256, "--data.loader", "torch", "--data.num-workers", 0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster() as found:
        yield found


def submit(cluster: Cluster, directory: Path, *flags: object) -> str:
    """Submit `digits`; returns the number of the job."""
    said = cluster.call(SCRIPT, "submit", "digits", "--run-dir", directory, *flags)
    return re.match(r"job (\d+): digits in ", said)[1]


def log_of(directory: Path, job: str) -> str:
    path = directory / f"slurm-{job}.log"
    return path.read_text() if path.is_file() else ""


@pytest.fixture(scope="module")
def flags(data_cache: Path) -> list[object]:
    return [*TWO_NODES, *SHORT, *ONE_RATIO, "--data.cache", data_cache, "--record.wandb", "offline"]


def assert_goes_on(cluster: Cluster, directory: Path, job: str) -> None:
    """A job that saved is back in the queue, starts once more, and ends with its work done."""
    assert wait_until(lambda: cluster.jobs().get(job) in ("PENDING", None), 300)
    assert cluster.jobs().get(job) == "PENDING", log_of(directory, job)
    # SLURM would wait for two minutes: until the nodes have tidied up, and their clocks are past the first end
    assert wait_until(lambda: cluster.has_left(job), 300)
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    cluster.wait()
    assert cluster.field(job, "Restarts") == "1"
    assert cluster.field(job, "JobState") == "COMPLETED", f"{log_of(directory, job)}{cluster.logs()}"
    assert "sparse: goes on from the checkpoint after step" in log_of(directory, job)


def test_a_job_on_two_nodes_that_is_told_to_save_is_requeued_and_ends_as_an_undisturbed_run_bit_for_bit(
    cluster: Cluster, flags: list[object], whole_run: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    job = submit(cluster, directory, *flags)
    # early: what it does then takes seconds, and it is told for good
    assert wait_until(lambda: "sparse: " in log_of(directory, job), 600), log_of(directory, job)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    assert_goes_on(cluster, directory, job)
    found = results(directory)
    assert (found["world_size"], found["loader"], found["device"]) == (2, "ffcv", "cpu")
    assert not (directory / "failed").exists()
    assert_equal_runs(directory, whole_run)
    ids = [path.name.rsplit("-", 1)[1] for path in sorted((directory / "wandb").glob("offline-run-*"))]
    # one for each stage, also where sparsity training had begun its own before it was stopped
    assert len(set(ids)) == 4


def test_a_step_that_is_told_to_end_without_the_signal_before_is_requeued_and_goes_on(
    cluster: Cluster, data_cache: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    short = [*SHORT, *ONE_RATIO, *QUICK, "--sparsify.epochs", 12, "--processes-per-node", 1, "--data.cache", data_cache]
    job = submit(cluster, directory, *short, "--record.wandb", "disabled")
    assert wait_until(lambda: "sparse: epoch 1/12" in log_of(directory, job), 600), log_of(directory, job)
    cluster.call("scancel", "--signal=TERM", f"{job}.0")
    assert_goes_on(cluster, directory, job)


def test_a_cancelled_job_leaves_no_process_and_hostile_names_run_nothing(
    cluster: Cluster, flags: list[object], tmp_path: Path
) -> None:
    hostile = "a b'c\"d $(touch HACKED) `touch HACKED`; touch HACKED #%j"
    directory = tmp_path / hostile
    names = ["--job-name", hostile, "--comment", hostile, "--record.group", hostile, "--record.tags", hostile]
    job = submit(cluster, directory, *flags, *names, "--sparsify.epochs", 1000)
    assert wait_until(lambda: "sparse: epoch 1/1000" in log_of(directory, job), 600), log_of(directory, job)
    assert processes_of(directory)
    assert json.loads((directory / "config.json").read_text())["record"]["group"] == hostile
    cluster.call("scancel", job)
    assert wait_until(lambda: not processes_of(directory), 300), processes_of(directory)
    cluster.wait(300)
    assert cluster.field(job, "JobState") == "CANCELLED"
    assert not [*tmp_path.rglob("HACKED"), *Path.cwd().glob("HACKED")]


def processes_of(directory: Path) -> list[str]:
    """What runs with this directory on its command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(directory) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def sweep(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """A sweep of two ratios, one member of which cannot write what it has pruned."""
    directory = tmp_path_factory.mktemp("sweep") / "sweep"
    obstacle = directory / "lambda-0_seed-0_ratio-0.90" / "prune-0.90"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()
    grid = ["--weights", "0", "--ratios", "0.5", "0.9", "--limit", 2]
    run = [*SHORT[:-3], "--sparsify.epochs", 1, *QUICK, "--data.cache", data_cache, "--record.wandb", "disabled"]
    cluster.call(SCRIPT, "sweep", "digits", "--run-dir", directory, *grid, *run, "--slurm", "--processes-per-node", 1)
    queue = cluster.jobs()
    waiting = [job for job, state in queue.items() if state == "PENDING"]
    assert len(waiting) >= 2 + 1, queue
    cluster.wait()
    obstacle.unlink()
    return directory


def states(cluster: Cluster, directory: Path) -> dict[str, str]:
    lines = cluster.call(SCRIPT, "sweep", "--status", directory).splitlines()[1:-1]
    return {line.split()[0]: line.split()[1] for line in lines}


def logs(directory: Path, pattern: str) -> str:
    return "".join(path.read_text() for path in sorted((directory / "slurm").glob(pattern)))


def test_a_sweep_trains_each_sparse_model_once_then_prunes_it_and_compares_what_came_of_it(
    cluster: Cluster, sweep: Path
) -> None:
    found = states(cluster, sweep)
    assert [state for name, state in found.items() if name != "lambda-0_seed-0_ratio-0.90"] == ["done"] * 2
    assert found["lambda-0_seed-0_ratio-0.90"] == "failed:"
    assert logs(sweep, "sparse-*.log").count("sparse: epoch 1/1") == 1
    assert "sparse: epoch" not in logs(sweep, "slim-*.log")
    table = logs(sweep, "compare-*.log")
    assert re.search(r"lambda-0_seed-0_ratio-0\.90 .*failed", table), table
    assert (sweep / "report.html").is_file()


def test_a_failed_member_is_submitted_again_alone(cluster: Cluster, sweep: Path) -> None:
    before = json.loads((sweep / "sweep.json").read_text())["jobs"]
    said = cluster.call(SCRIPT, "sweep", sweep, "--slurm")
    assert said.startswith("0 sparse models to train, 1 to prune and fine-tune after them, and a comparison")
    after = json.loads((sweep / "sweep.json").read_text())["jobs"]
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"lambda-0_seed-0_ratio-0.90", "comparison"}
    cluster.wait()
    assert set(states(cluster, sweep).values()) == {"done"}
    assert "nothing to submit" in cluster.call(SCRIPT, "sweep", sweep, "--slurm")


def test_what_slurm_refuses_is_said_in_its_own_words(cluster: Cluster, tmp_path: Path) -> None:
    command = [SCRIPT, "submit", "digits", "--run-dir", tmp_path / "run", "--partition", "nowhere"]
    environment = {**os.environ, **cluster.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "invalid partition specified: nowhere" in done.stderr
    assert (tmp_path / "run" / "submit.sh").is_file()
