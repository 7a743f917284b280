"""Batch scripts for SLURM: readable, and safe whatever stands in a name."""

import re
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from netslim.launch.batch.slurm import Shape, SlurmConfig, check_text
from netslim.launch.config import RunConfig
from netslim.launch.run import FAILED_MARK, PREEMPTED_MARK, STOP_MARK, launcher_flags


class _Template(string.Template):
    delimiter = "@"  # the dollar is the shell's


_RUN = _Template(r"""#!/bin/bash
@header

set -e
@environment
export OMP_NUM_THREADS=@threads
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # which srun does not take over by itself
@{cpu}# The launcher would report any other code as a failure.
export NETSLIM_PREEMPTED_CODE=0

@which
mkdir -p "$run_dir"
rm -f "$run_dir/@preempted" "$run_dir/@failed" "$run_dir/@stop"
export NETSLIM_STOP_FILE="$run_dir/@stop"

# All processes meet at the first node, at a port of this job's own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Before the time is up SLURM sends USR1 to this shell; rank 0, on this node, looks for the file after each step.
late=
trap 'touch "$run_dir/@stop"; late=$((SECONDS + @patience))' USR1

# shellcheck disable=SC2016  # expanded on each node
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch @launcher \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
        --rdzv_backend static -m netslim.launch.recipe "$@@"
' launch "${recipe[@@]}" &
step=$!

code=
while [ -z "$code" ] && [ "$SECONDS" -lt "${late:-$((SECONDS + 1))}" ]; do
    if [ -n "$late" ]; then sleep 1; else wait "$step" || true; fi  # a signal ends the wait early
    kill -0 "$step" 2>/dev/null || { wait "$step" && code=0 || code=$?; }
done

# Saved, or with no step of training at hand that could be saved, as during a repair: the job goes on from there.
if [ -e "$run_dir/@preempted" ] || [ -z "$code" ]; then
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # one of an array alone
    job=${job:-$SLURM_JOB_ID}
    # Its step may have been told to end by itself, without the signal to this shell; a job that is cancelled stays so.
    state=$(scontrol show job "$job" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p')
    if [ "$state" != CANCELLED ] && [ "${SLURM_RESTART_COUNT:-0}" -lt @requeues ]; then
        echo "netslim: job $job goes back into the queue"
        scontrol requeue "$job"
        sleep 60  # until SLURM ends this shell
    fi
    echo "netslim: stopped after ${SLURM_RESTART_COUNT:-0} requeues of at most @requeues; to go on:" @again >&2
    exit 1
fi
if [ "$code" -ne 0 ]; then
    echo "job $SLURM_JOB_ID ended with exit code $code; its log says why" > "$run_dir/@failed"
fi
exit "$code"
""")

_COMMAND = _Template("""#!/bin/bash
@header

set -e
@environment
exec @command
""")

# Of the options that a user gives, those that a job without GPUs and of one core must have too.
_EVERYWHERE = ("--account", "--partition", "--qos", "--reservation", "--clusters", "--mail-user", "--mail-type")


@dataclass(frozen=True)
class Script:
    """What differs between one batch script and another."""

    title: str
    """What it is for, in a line."""
    path: Path
    """Where it is kept, by which it can be submitted again."""
    job_name: str
    log: Path
    """With SLURM's %j and the like in its name."""
    directory: Path
    """In which the commands run: where netslim was called."""
    bin: Path = Path(sys.executable).parent
    """Where the programs accelerate and netslim are, if no environment is activated."""


def batch_script(script: Script, slurm: SlurmConfig, config: RunConfig, which: Sequence[str]) -> str:
    """The batch script of a run: one `accelerate launch` a node, told to save before its time ends, and requeued.

    ``which`` are shell lines that set ``run_dir`` and the array ``recipe``, the arguments of netslim.launch.recipe.
    """
    shape = Shape.of(slurm, config)
    launcher = launcher_flags(
        num_processes=shape.world_size,
        num_machines=shape.nodes,
        zero=config.engine.zero,
        precision=config.engine.precision,
    )
    if config.engine.zero and shape.nodes > 1:
        launcher += ["--deepspeed_multinode_launcher", "standard"]  # the other one connects to the nodes by itself
    return _RUN.substitute(
        header=_header(script, _options(shape, slurm)),
        environment=_environment(script, slurm),
        threads=shape.threads,
        cpu="export ACCELERATE_USE_CPU=1\n" * config.cpu,
        which="\n".join(which),
        launcher=" ".join(launcher),
        preempted=PREEMPTED_MARK,
        failed=FAILED_MARK,
        stop=STOP_MARK,
        # what is left of the time is for SLURM
        patience=max(1, slurm.save_seconds - 15),
        requeues=slurm.requeues,
        again=shlex.quote(f"sbatch {shlex.quote(str(script.path))}"),
    )


def command_script(script: Script, slurm: SlurmConfig, command: Sequence[str]) -> str:
    """A batch script of one process, on one core."""
    asked = [option for option in slurm.options if option.split("=")[0] in _EVERYWHERE]
    return _COMMAND.substitute(
        header=_header(script, ["--ntasks=1", *asked]),
        environment=_environment(script, slurm),
        command=shlex.join(command),
    )


def _header(script: Script, options: Sequence[str]) -> str:
    """What the script is, and the options of sbatch; the last of two counts."""
    for text in (script.title, script.path, script.directory, *options):
        check_text(str(text))
    if "\\" in str(script.log):
        raise ValueError(f"{script.log.parent} has a backslash, which SLURM takes for its own; use another --run-dir")
    log = script.log.parent.as_posix().replace("%", "%%") + f"/{script.log.name}"
    fixed = [f"--job-name={script.job_name}", f"--output={log}"]
    directives = [_directive(option) for option in (*fixed, *options)]
    return "\n".join([f"# {script.title}", f"# Again: sbatch {shlex.quote(str(script.path))}", *directives])


def _options(shape: Shape, slurm: SlurmConfig) -> list[str]:
    own = [f"--nodes={shape.nodes}", "--ntasks-per-node=1"]
    own += [f"--gpus-per-node={shape.gpus}"] if shape.gpus not in ("", "0") else []
    own += [f"--cpus-per-task={shape.cpus}"] if shape.cpus is not None else []
    return [*own, f"--signal=B:USR1@{slurm.save_seconds}", "--requeue", "--open-mode=append", *slurm.options]


def _directive(option: str) -> str:
    """An option in the header, by sbatch's own rules of quoting."""
    name, has_value, value = option.partition("=")
    if not re.fullmatch(r"[\w@%+=:,./-]*", value, re.ASCII):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        value = f'"{escaped}"'
    return f"#SBATCH {name}{has_value}{value}"


def _environment(script: Script, slurm: SlurmConfig) -> str:
    """Shell lines that make accelerate and netslim known, and go to where netslim was called."""
    lines = _sourced(slurm.setup) if slurm.setup else []
    lines += [f"module load {shlex.join(slurm.modules)}"] if slurm.modules else []
    lines += _sourced(slurm.venv / "bin" / "activate") if slurm.venv else []
    if slurm.conda:
        lines += ['eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(slurm.conda)}"]
    if not (slurm.venv or slurm.conda):
        lines.append(f"export PATH={shlex.quote(str(script.bin))}:$PATH")
    return "\n".join([*lines, f"cd {shlex.quote(str(script.directory))}"])


def _sourced(path: Path) -> list[str]:
    return ["# shellcheck source=/dev/null", f". {shlex.quote(str(path.absolute()))}"]
