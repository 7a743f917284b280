"""Batch scripts: readable, checked by the shell and by shellcheck, and nothing in a name is ever executed."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_launch_cli import Netslim, assert_one_line

from netslim.launch.batch import submit
from netslim.launch.batch.script import Script, batch_script, command_script
from netslim.launch.batch.slurm import Shape, SlurmConfig, _minutes, split_flags
from netslim.launch.cli import dispatch
from netslim.launch.presets import digits, vgg19_cifar10
from netslim.launch.sweep.grid import Member, Sweep
from netslim.launch.sweep.jobs import array_script

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "launch" / "sbatch"
BIN = Path(sys.executable).parent
PRINT = 'printf "%s\\n" "$@"'
HOSTILE = "a b'c\"d $(touch HACKED) `touch HACKED` ; touch HACKED #x \\ %j !! ~ *"


def example(name: str) -> str:
    """The script of an example in launch/sbatch, as netslim makes it for a user's directory."""
    home = Path("/home/you/netslim")
    venv = SlurmConfig(venv=home / ".venv")
    preset, config, slurm = {
        "one_node": ("vgg19-cifar10", vgg19_cifar10(), replace(venv, gpus_per_node="8", options=("--time=4:00:00",))),
        "several_nodes": (
            "vgg19-cifar10",
            replace(vgg19_cifar10(), data=replace(vgg19_cifar10().data, batch_size=128)),
            SlurmConfig(
                nodes=2,
                gpus_per_node="8",
                conda="netslim",
                modules=("cuda/13.0", "gcc"),
                options=("--time=4:00:00", "--account=vision", "--partition=gpu", "--mail-user=you@example.org"),
            ),
        ),
        "cpu": ("digits", digits(), replace(venv, nodes=2, options=("--time=30",))),
        "requeue": (
            "vgg19-cifar10",
            vgg19_cifar10(),
            replace(
                venv, gpus_per_node="8", save_seconds=300, requeues=50, options=("--time=1:00:00", "--qos=preemptible")
            ),
        ),
    }[name]
    directory = home / "runs" / preset
    script = Script(
        title=f"An example that netslim submit made; change the paths to yours. {TITLES[name]}",
        path=directory / "submit.sh",
        job_name=f"netslim-{preset}",
        log=directory / "slurm-%j.log",
        directory=home,
    )
    flags = " --data.batch-size 128" if name == "several_nodes" else ""
    return batch_script(
        script, slurm, config, [f"run_dir={directory}", f'recipe=({preset}{flags} --run-dir "$run_dir")']
    )


TITLES = {
    "one_node": "One node with eight GPUs.",
    "several_nodes": "Two nodes with eight GPUs each, an environment of conda, and modules.",
    "cpu": "Two nodes without GPUs.",
    "requeue": "Short jobs, one after the other, on nodes that others may claim.",
}


@pytest.mark.parametrize("name", TITLES)
def test_the_examples_are_what_netslim_makes(name: str) -> None:
    """They are written anew by `python tests/test_launch_submit.py`."""
    assert (EXAMPLES / f"{name}.sbatch").read_text() == example(name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*")), ids=lambda path: path.stem)
def test_shellcheck_finds_nothing_in_the_examples(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def run_with_stand_ins(text: str, directory: Path, srun: str = PRINT) -> subprocess.CompletedProcess[str]:
    """Run a script with programs in SLURM's place that print what they are called with, one argument a line."""
    programs = directory / "programs"
    programs.mkdir(exist_ok=True)
    for name, body in {
        "srun": srun,
        "scontrol": 'echo "NodeAddr=localhost"',
        "netslim": PRINT,
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    path = directory / "script.sh"
    path.write_text(text)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    environment |= {"SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_TASK_ID": "0"}
    return subprocess.run(["bash", path], env=environment, cwd=directory, capture_output=True, text=True, check=False)


texts = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" "), min_size=1)


@settings(max_examples=25, deadline=None)
@given(flag=texts | st.just(HOSTILE), name=texts.filter(lambda text: "/" not in text) | st.just(HOSTILE))
def test_whatever_stands_in_a_flag_or_a_path_reaches_the_recipe_as_it_is(
    flag: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("hostile")
    made = Script(
        title=flag, path=directory / name / "s.sh", job_name=name, log=directory / "%j.log", directory=directory
    )
    quoted = shlex.join(["digits", "--record.group", flag, "--run-dir", str(directory / name)])
    which = [f"run_dir={shlex.quote(str(directory / name))}", f"recipe=({quoted})"]
    slurm = SlurmConfig(options=(f"--comment={flag}",))
    config = replace(digits(), num_processes=1)
    text = batch_script(made, slurm, config, which).replace(f"export PATH={BIN}:$PATH", "")
    done = run_with_stand_ins(text, directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-5:] == ["digits", "--record.group", flag, "--run-dir", str(directory / name)]
    command = command_script(made, slurm, ["netslim", "compare", flag]).replace(f"export PATH={BIN}:$PATH", "")
    assert run_with_stand_ins(command, directory).stdout.splitlines() == ["compare", flag]
    assert not list(directory.rglob("HACKED"))


def test_a_failed_step_leaves_a_mark_and_its_exit_code(tmp_path: Path) -> None:
    made = submit.script_of_run("digits", tmp_path / "run", digits(), SlurmConfig(), [], [])
    done = run_with_stand_ins(made.replace(f"export PATH={BIN}:$PATH", ""), tmp_path, srun="exit 7")
    assert done.returncode == 7
    assert (tmp_path / "run" / "failed").read_text() == "job 7 ended with exit code 7; its log says why\n"


def test_flags_are_divided_among_netslim_sbatch_and_the_run() -> None:
    given = "--nodes 2 --partition gpu --prune.ratio 0.5 0.7 --no-dry-run --no-cpu --mail-user=a@b --exclusive --seed 3"
    (own,), options, run = split_flags(given.split(), [SlurmConfig])
    assert own == ["--nodes", "2", "--no-dry-run"]
    assert options == ["--partition=gpu", "--mail-user=a@b", "--exclusive"]
    assert run == ["--prune.ratio", "0.5", "0.7", "--no-cpu", "--seed", "3"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--dryrun"], ["neither netslim nor sbatch has a flag --dryrun", "--dry-run"]),
        (["--array", "0-3"], ["--array is set by netslim"]),
        (["--partition", "a", "b"], ["--partition", "takes one value"]),
        (["--gpus-per-node", "many"], ["gpus"]),
        (["--nodes", "0"], ["nodes", "0"]),
        (["--gpus-per-node", "2"], ["2 GPUs", "--no-cpu"]),
        (["--no-cpu", "--gpus-per-node", "0"], ["no GPUs", "--cpu"]),
        (["--no-cpu", "--gpus-per-node", "2", "--gres", "gpu:2"], ["--gres=gpu:2", "give one of them"]),
        (["--setup", "nowhere.sh"], ["--setup nowhere.sh", "no such file"]),
        (["--venv", "nowhere"], ["--venv nowhere", "bin/activate"]),
        (["--comment", "two\nlines"], ["no part of a line"]),
        (["--time", "2"], ["--save-seconds 120", "--time", "120 seconds"]),
        (["--prune.ratio", "1.5"], ["prune.ratio", "1.5"]),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_written(
    flags: list[str], parts: list[str], netslim: Netslim, tmp_path: Path
) -> None:
    code, said = netslim("submit", "digits", "--run-dir", tmp_path / "run", *flags)
    assert code == 2
    assert_one_line(said, *parts)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_processes_cannot_divide_is_refused_before_it_is_submitted(
    netslim: Netslim, tmp_path: Path
) -> None:
    code, said = netslim("submit", "digits", "--run-dir", tmp_path / "run", "--nodes", 3, "--processes-per-node", 1)
    assert code == 2
    assert_one_line(said, "64", "3")
    assert not (tmp_path / "run").exists()


def test_without_sbatch_the_script_is_kept_and_the_remedy_said(
    netslim: Netslim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = netslim("submit", "digits", "--run-dir", tmp_path / "run")
    assert code == 2
    assert_one_line(said, "no sbatch on this machine", "login node")
    assert (tmp_path / "run" / "submit.sh").is_file()


def test_a_dry_run_prints_the_script_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dispatch(["submit", "digits", "--run-dir", str(tmp_path / "run"), "--dry-run", "--time", "10"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n# netslim submit digits ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("30", 30),
        ("1:30", 1.5),
        ("4:00:00", 240),
        ("2-1", 49 * 60),
        ("1-0:5", 24 * 60 + 5),
        ("1-0:0:30", 24 * 60 + 0.5),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(time: str, minutes: float) -> None:
    assert _minutes(time) == minutes


def test_names_of_environments_reach_their_programs_as_they_are(tmp_path: Path) -> None:
    made = Script(title="", path=tmp_path / "s.sh", job_name="", log=tmp_path / "%j.log", directory=tmp_path)
    setup = tmp_path / HOSTILE.replace("/", "") / "setup.sh"
    setup.parent.mkdir()
    setup.write_text(
        'module() { printf "module %s\n" "${@:2}"; }\n'
        'conda() { if [ "$1" = activate ]; then printf "conda %s\n" "$2"; fi; }\n'
    )
    slurm = SlurmConfig(setup=setup, modules=(HOSTILE, "gcc"), conda=HOSTILE)
    done = run_with_stand_ins(command_script(made, slurm, ["netslim", "compare"]), tmp_path)
    assert done.stdout.splitlines() == [f"module {HOSTILE}", "module gcc", f"conda {HOSTILE}", "compare"], done.stderr
    assert not list(tmp_path.rglob("HACKED"))


def test_the_members_of_an_array_are_found_whatever_the_name_of_their_sweep(tmp_path: Path) -> None:
    directory = tmp_path / HOSTILE.replace("\\", "")
    directory.mkdir()
    members = [Member(1e-4, 0, 0.5), Member(0, 0, 0.5)]
    sweep = Sweep(directory, "digits", digits(), members, [], {})
    text = array_script(sweep, SlurmConfig(), "slim", members).replace(f"export PATH={BIN}:$PATH", "")
    done = run_with_stand_ins(text, tmp_path)
    run = directory / "lambda-0.0001_seed-0_ratio-0.50"
    assert done.stdout.splitlines()[-5:] == ["digits", "--config", f"{run}/config.json", "--run-dir", str(run)], (
        done.stderr
    )
    assert not list(tmp_path.rglob("HACKED"))


@pytest.mark.parametrize(
    ("slurm", "world_size", "cpus"),
    [
        (SlurmConfig(nodes=2, gpus_per_node="a100:8"), 16, 8 * 5),
        (SlurmConfig(options=("--gres=gpu:v100:4",)), 4, 4 * 5),
        (SlurmConfig(options=("--gres=gpu:4", "--cpus-per-gpu=6")), 4, None),
        (SlurmConfig(), 1, 5),
    ],
)
def test_a_process_is_started_for_each_gpu_and_cores_are_asked_for_its_loader(
    slurm: SlurmConfig, world_size: int, cpus: int | None
) -> None:
    config = vgg19_cifar10()
    shape = Shape.of(slurm, replace(config, data=replace(config.data, num_workers=4)))
    assert (shape.world_size, shape.cpus) == (world_size, cpus)


if __name__ == "__main__":
    for each in TITLES:
        (EXAMPLES / f"{each}.sbatch").write_text(example(each))
