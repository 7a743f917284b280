"""What a job needs of SLURM, read from flags, and what is asked of SLURM itself."""

import contextlib
import dataclasses
import difflib
import io
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from netslim.launch.config import RunConfig, field_names
from netslim.launch.reading import read_flags

_GPUS = r"([\w.-]+:)?\d+"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SlurmConfig:
    nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes of a job; each runs one `accelerate launch`."""
    gpus_per_node: Annotated[str, Field(pattern=f"^{_GPUS}$")] | None = None
    """As sbatch has it, 8 or a100:8; None is 1, or 0 where the preset computes on the CPU. Where a cluster counts GPUs
    by --gres, give that instead."""
    processes_per_node: Annotated[int, Field(ge=1)] | None = None
    """None is one per GPU; on the CPU num_processes, or one."""
    save_seconds: Annotated[int, Field(ge=1)] = 120
    """How long before the time limit, or before it gives up its nodes, a job is told to save."""
    requeues: Annotated[int, Field(ge=0)] = 10
    """How often a job that was told to save is put back into the queue, to go on from there."""
    modules: tuple[str, ...] = ()
    """Environment modules that a job loads first."""
    venv: Path | None = None
    """Virtual environment that a job activates; without it and conda, the programs of the one that submits are used."""
    conda: str | None = None
    """Conda environment that a job activates, by name or path."""
    setup: Path | None = None
    """A shell file that a job reads before anything else, for what the settings above cannot say."""
    dry_run: bool = False
    """Print the script; write and submit nothing."""
    options: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Any other options of sbatch, as --name=value."""


_words = re.compile(r"\S+").findall
_OURS = frozenset(
    _words(
        """array chdir error gpus gpus-per-task input ntasks ntasks-per-gpu ntasks-per-node no-requeue open-mode output
        parsable requeue signal test-only wait wrap"""
    )
)
"""Options of sbatch that a script depends on."""
_OPTIONS = frozenset(
    _words(
        """account acctg-freq batch bb bbf begin cluster-constraint clusters comment constraint container container-id
        contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
        distribution exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq
        gpus-per-socket gres gres-flags hint hold ignore-pbs job-name kill-on-invalid-dep licenses mail-type mail-user
        mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill nodefile nodelist ntasks-per-core
        ntasks-per-socket overcommit oversubscribe partition power prefer priority profile propagate qos reboot
        reservation resv-ports segment sockets-per-node spread-job stepmgr switches thread-spec threads-per-core time
        time-min tmp tres-bind tres-per-task uid use-min-nodes wait-all-nodes wckey x11"""
    )
)
"""The others."""


def split_flags(arguments: Sequence[str], kinds: Sequence[type]) -> tuple[list[list[str]], list[str], list[str]]:
    """Divide a command line into the flags of each of the ``kinds``, of sbatch (as --name=value) and of the run.

    Raises ValueError for an option of sbatch that the script must set itself, and for a flag that nobody knows.
    """
    owners = {
        f"--{field.name.replace('_', '-')}": index
        for index, kind in enumerate(kinds)
        for field in dataclasses.fields(kind)
        if field.name != "options"
    }
    run = {f"--{name.replace('_', '-')}" for name in field_names(RunConfig())} | {"--config", "--model", "--help"}
    own: list[list[str]] = [[] for _ in kinds]
    options: list[str] = []
    of_run: list[str] = []
    for flag, values in flag_groups(arguments):
        name, has_value, value = flag.partition("=")
        dashed = name.replace("_", "-")
        spellings = {dashed, re.sub(r"(^--|\.)no-", r"\1", dashed)}
        if owned := spellings & owners.keys():
            own[owners[owned.pop()]].extend([flag, *values])
        elif spellings & run or not name.startswith("--"):
            of_run.extend([flag, *values])
        elif name.removeprefix("--") in _OURS:
            raise ValueError(f"{name} is set by netslim, which the script depends on; leave it out")
        elif name.removeprefix("--") in _OPTIONS:
            given = [*([value] if has_value else []), *values]
            if len(given) > 1:
                raise ValueError(f"{name} is an option of sbatch and takes one value; got {' '.join(given)}")
            options.append("=".join([name, *given]))
        else:
            names = [*owners, *run, *(f"--{option}" for option in _OPTIONS)]
            close = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
            hint = f"the nearest are {', '.join(close)}" if close else "none has a name like it"
            raise ValueError(f"neither netslim nor sbatch has a flag {name}; {hint}")
    return own, options, of_run


def flag_groups(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the values after it."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--") or not found:
            found.append((argument, []))
        else:
            found[-1][1].append(argument)
    return found


def read_slurm_flags(own: Sequence[str], options: Sequence[str]) -> SlurmConfig:
    """The settings of a job; raises ValueError in one line."""
    config = read_flags(SlurmConfig, own, prog="netslim submit")
    for text in (*options, *config.modules, config.conda or "", str(config.venv), str(config.setup)):
        check_text(text)
    if config.setup is not None and not config.setup.is_file():
        raise FileNotFoundError(f"--setup {config.setup}: there is no such file")
    if config.venv is not None and not (config.venv / "bin" / "activate").is_file():
        raise FileNotFoundError(f"--venv {config.venv}: there is no bin/activate in it")
    minutes = next((_minutes(option.split("=")[1]) for option in options if option.startswith("--time=")), None)
    if minutes is not None and 60 * minutes <= config.save_seconds:
        raise ValueError(
            f"--save-seconds {config.save_seconds} leaves nothing of --time, which is {60 * minutes:g} seconds; "
            "give a longer --time, or fewer seconds to save in"
        )
    return dataclasses.replace(config, options=tuple(options))


def _minutes(time: str) -> float | None:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None where it is none of them."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:  # sbatch says what is wrong with it
        return None
    days, *parts = (int(part or 0) for part in found.groups())
    starts_with_hours = found[1] is not None or found[4] is not None
    hours, minutes, seconds = parts if starts_with_hours else (0, *parts[:2])
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def describe_flags(kind: type) -> str:
    """The flags of a kind of settings, for a help text."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog="")
    return text.getvalue().partition("\n\n")[2].rstrip()


def check_text(text: str) -> str:
    """A text that may stand in a script; raises ValueError for one that would end its line."""
    if not text.isprintable():
        raise ValueError(f"{text!r} has a character that is no part of a line; leave it out")
    return text


@plain_dataclass(frozen=True)
class Shape:
    """How many processes a job has, and what it asks SLURM for."""

    nodes: int
    gpus: str
    """As sbatch counts them, 8 or a100:8; 0 on the CPU, empty where --gres says it."""
    processes: int
    """On each node."""
    cpus: int | None
    """Cores of each node; None where the user says it."""
    threads: int
    """With which a process computes."""

    @classmethod
    def of(cls, slurm: SlurmConfig, config: RunConfig) -> "Shape":
        """Raises ValueError where GPUs are counted twice, or do not go with the run."""
        gpus, num_gpus = _count_gpus(slurm, config)
        if num_gpus and config.cpu:
            raise ValueError(f"{num_gpus} GPUs are asked for, but the run computes on the CPU; give --no-cpu, or none")
        if not num_gpus and not config.cpu:
            raise ValueError("no GPUs are asked for, so the run must compute on the CPU: give --cpu")
        processes = slurm.processes_per_node or num_gpus or config.num_processes or 1
        counted = [option for option in slurm.options if option.startswith("--cpus-per-")]
        # a process that computes on a GPU has threads that load its images
        cpus = None if counted else processes * (1 + config.data.num_workers * bool(num_gpus))
        given = re.search(r"--cpus-per-task=(\d+)", " ".join(counted))
        return cls(slurm.nodes, gpus, processes, cpus, max(1, int(given[1]) // processes) if given else 1)

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    def __str__(self) -> str:
        return f"{self.nodes} x {self.processes} processes"


def _count_gpus(slurm: SlurmConfig, config: RunConfig) -> tuple[str, int]:
    """The GPUs of a node, as sbatch counts them and as a number."""
    gres = next((option for option in slurm.options if re.match(r"--gres=(.*,)?gpu\b", option)), "")
    if slurm.gpus_per_node and gres:
        raise ValueError(f"--gpus-per-node {slurm.gpus_per_node} and {gres} both count GPUs; give one of them")
    if gres:
        counted = re.search(r"gpu(?::[\w.-]*[a-z][\w.-]*)?:(\d+)", gres)
        return "", int(counted[1]) if counted else 1
    gpus = slurm.gpus_per_node or ("0" if config.cpu else "1")
    return gpus, int(gpus.rpartition(":")[2])


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; returns the job's number. Raises ValueError with what SLURM says where it refuses it."""
    answer = _ask("sbatch", "--parsable", *options, str(script), failure=f"{script} is written, but SLURM refused it")
    return answer.strip().split(";")[0]  # after which is the cluster's name


def control(*arguments: str) -> None:
    """Call scontrol; raises ValueError with what SLURM says where it refuses."""
    _ask("scontrol", *arguments, failure="SLURM refused a change")


def cancel(job: str) -> None:
    """Take a job out of the queue, or end it."""
    _ask("scancel", job, failure="SLURM did not cancel a job")


def queued() -> dict[str, str]:
    """The state, as SLURM calls it, of each of the user's jobs that has not ended, by number: 7, or 7_0 in an array."""
    lines = _ask("squeue", "--me", "--array", "--noheader", "--format=%i %T", failure="SLURM does not answer")
    return dict(line.split() for line in lines.splitlines())


def _ask(*command: str, failure: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"there is no {command[0]} on this machine; call netslim on a login node of the cluster, or use --dry-run"
        ) from None
    if done.returncode:
        raise ValueError(f"{failure}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
