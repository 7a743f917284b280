"""What a command ignores, leaves out or replaces is said in one line, once."""

import errno
import fcntl
import json
from pathlib import Path

import pytest
import torch
from test_launch_cli import Netslim

from netslim.launch.batch import Shape, SlurmConfig
from netslim.launch.batch.submit import of_job
from netslim.launch.cli import dispatch
from netslim.launch.config import FinetuneConfig, RunConfig, field_names, unread_fields
from netslim.launch.mistakes import LAUNCHER_VARIABLE
from netslim.launch.presets import digits, read_preset
from netslim.launch.run.directory import occupied
from netslim.launch.run.processes import count_processes, of_launcher, warn_of_cpu, warn_of_overruled
from netslim.train import EngineConfig, FitConfig


def warnings_of(said: str) -> list[str]:
    """The warnings among the lines of stderr, without their heads."""
    return [line.partition("warning: ")[2] for line in said.splitlines() if "warning: " in line]


def test_a_file_system_without_locks_is_said_to_keep_no_run_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)  # as Lustre answers where it is mounted without
        with occupied(tmp_path):
            pass
    (line,) = warnings_of(capfd.readouterr().err)
    assert f"{tmp_path} has no locks" in line
    with occupied(tmp_path):
        pass
    assert capfd.readouterr().err == ""


def test_a_sweep_says_that_it_takes_no_wandb_run_id_here_and_as_jobs(
    netslim: Netslim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    code, said = netslim("sweep", "digits", "--run-dir", tmp_path / "sweep", "--slurm", "--dry-run")
    assert code == 0
    assert warnings_of(said) == ["ignores WANDB_RUN_ID: it names one run, and a sweep has many"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data.white", "4095", "--data.no-upright"], ["data.upright", "data.white", "data.source is digits"]),
        (["--data.quality", "80", "--data.loader", "torch"], ["data.quality (data.loader is torch)"]),
        (["--sparsify.milestones", "0.6"], ["sparsify.milestones (sparsify.schedule is onecycle)"]),
        (["--finetune.decay", "weights", "--finetune.weight-decay", "0"], ["finetune.decay"]),
        (["--sparsity.reconfigure-below", "1e-3"], ["sparsity.reconfigure_below (sparsity.reconfigure_every is None)"]),
        (["--prune.reduce", "sum", "--prune.coupling", "select"], ["prune.reduce (prune.coupling is select)"]),
        (["--repair.steps", "--repair.no-auto", "--repair.images", "64"], ["repair.auto", "repair.images"]),
        (["--engine.precision", "fp16", "--sparsify.skip-nonfinite", "3"], ["sparsify.skip_nonfinite"]),
    ],
)
def test_a_field_that_nothing_reads_beside_the_others_is_named_once(
    flags: list[str], told: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_preset("netslim run", "digits", flags)
    (line,) = warnings_of(capfd.readouterr().err)
    for part in ("nothing reads ", *told):
        assert part in line
    for name, value in (("RANK", "1"), (LAUNCHER_VARIABLE, "7")):  # which the first rank, or the command, has said
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            read_preset("netslim run", "digits", flags)
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--data.source", "folder", "--data.white", "4095"],
        ["--sparsify.schedule", "step", "--sparsify.milestones", "0.6"],
        ["--sparsity.method", "proximal", "--sparsity.reconfigure-below", "1e-3"],
        ["--repair.steps", "--repair.images", "64", "--prune.score", "reconstruction"],
        ["--sparsify.schedule", "cosine", "--repair.steps"],  # of which the preset says the rest, not the user
    ],
)
def test_a_field_that_is_read_or_that_nobody_has_set_is_no_matter(
    flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    config = read_preset("netslim run", "digits", flags)
    assert capfd.readouterr().err == ""
    assert unread_fields(config).keys() <= {*field_names(config)}


def test_what_a_launcher_or_a_job_says_otherwise_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(num_processes=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert of_launcher(config)["num_processes"] == "the launcher started 4"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert of_launcher(config).keys() == of_launcher(RunConfig()).keys() == {"max_restarts"}
    for gpus, told in (("2", {"max_restarts"}), ("a100:8", {"max_restarts", "num_processes"})):
        assert of_job(config, Shape.of(SlurmConfig(gpus_per_node=gpus), config)).keys() == told
    on_cpu = digits()
    assert of_job(on_cpu, Shape.of(SlurmConfig(), on_cpu)).keys() == {"max_restarts"}


@pytest.mark.parametrize(("variable", "why"), [("y", "ACCELERATE_USE_CPU asks for that"), ("0", "torch finds no GPU")])
def test_a_run_that_could_have_had_gpus_says_once_why_it_computes_on_the_cpu(
    variable: str, why: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for config, lines in ((RunConfig(), [f"computes on the CPU: {why}; with --cpu that is meant"]), (digits(), [])):
        warn_of_cpu.cache_clear()
        for _ in range(2):
            count_processes(config)
        assert warnings_of(capfd.readouterr().err) == lines


def test_stages_that_are_done_already_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = {"stage": "cut", "ratio": 0.5}
    (tmp_path / "prune-0.50").mkdir()
    (tmp_path / "prune-0.50" / "metrics.json").write_text(json.dumps(row))
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row]}))
    assert dispatch(["prune", "digits", "--run-dir", str(tmp_path), "--prune.ratio", "0.5"]) == 0
    assert capfd.readouterr().out.splitlines()[0] == "done already, 1 of 1 stages: prune-0.50"


def test_what_the_configuration_overrules_of_a_launchers_choices_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, config = "ACCELERATE_GRADIENT_", RunConfig(engine=EngineConfig(accumulation=2, zero=2))
    for name, value in (("ACCUMULATION_STEPS", "4"), ("CLIPPING", "1.0")):
        monkeypatch.setenv(f"{prefix}{name}", value)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    warn_of_overruled(config)
    (line,) = warnings_of(capfd.readouterr().err)
    assert line == (
        f"the configuration overrules {prefix}ACCUMULATION_STEPS 4 (by engine.accumulation 2), "
        f"{prefix}CLIPPING 1.0 (by sparsify.clip and finetune.clip None)"
    )
    clipped = {"sparsify": FitConfig(clip=1.0), "finetune": FinetuneConfig(clip=1.0)}
    monkeypatch.setenv(f"{prefix}ACCUMULATION_STEPS", "1")
    warn_of_overruled(RunConfig(**clipped))
    assert capfd.readouterr().err == ""
