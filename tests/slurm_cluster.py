"""A real SLURM with two nodes, all on this host: munged, slurmctld and two slurmd, in a directory of their own."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=1,sched_min_interval=0
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
CGROUPS = "CgroupPlugin={}\n"
"""What cgroup.conf says, or SLURM would look for a cgroup file system, which containers lack."""


@dataclass(frozen=True)
class Cluster:
    environment: dict[str, str]
    """With which programs find it."""

    def call(self, *command: object, directory: Path | None = None) -> str:
        """What a program prints; raises AssertionError with what it says where it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, **self.environment},
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def version(self) -> tuple[int, ...]:
        """Its year and month, as in `slurm-wlm 22.05.8`."""
        return tuple(int(number) for number in self.call("slurmd", "-V").split()[-1].split(".")[:2])

    def logs(self) -> str:
        """What the daemons have said last."""
        files = sorted(Path(self.environment["SLURM_CONF"]).parent.glob("*.log"))
        return "".join(f"\n{path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def has_idle_nodes(self, number: int) -> bool:
        """Whether the cluster is up, and so many nodes have nothing to do."""
        with contextlib.suppress(AssertionError):
            return self.call("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(number)
        return False

    def has_left(self, job: str) -> bool:
        """Whether nothing of a job is on its nodes any more, so that it can be started again."""
        daemons = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return self.has_idle_nodes(2) and not any(line.startswith(f"slurmstepd: [{job}.") for line in daemons)

    def jobs(self) -> dict[str, str]:
        """The state of each job that has not ended."""
        return dict(line.split() for line in self.call("squeue", "--array", "-h", "-o", "%i %T").splitlines())

    def field(self, job: str, name: str) -> str:
        """What SLURM says of a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, seconds: float = 600) -> None:
        """Until no job is left."""
        assert wait_until(lambda: not self.jobs(), seconds), self.jobs()


def wait_until(holds: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.3)
    return True


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start the daemons, and end them and what they run; skips where they are not installed."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root may start jobs as SLURM does")
    with ExitStack() as stack:
        # short: the path of a socket has a hundred characters at most
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")))
        directory.chmod(0o755)
        cluster = Cluster({"SLURM_CONF": str(directory / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"})
        configure(directory)
        is_new = cluster.version() >= (23, 2)  # older ones know no plugin "disabled", and mount nothing for this one
        (directory / "cgroup.conf").write_text(CGROUPS.format("disabled" if is_new else "cgroup/v1"))
        munge = directory / "munge"
        files = {
            name: munge / name.split("-")[0] for name in ("key-file", "log-file", "pid-file", "seed-file", "socket")
        }
        daemons = {
            "munged": ["munged", "--foreground", *(f"--{name}={path}" for name, path in files.items())],
            "slurmctld": ["slurmctld", "-D"],
            "n1": ["slurmd", "-D", "-N", "n1"],
            "n2": ["slurmd", "-D", "-N", "n2"],
        }
        for name, command in daemons.items():
            stack.callback(end, start(command, cluster, directory / f"{name}.log"))
            assert name != "munged" or wait_until(files["socket"].exists, 60), f"munged does not start{cluster.logs()}"
        assert wait_until(lambda: cluster.has_idle_nodes(2), 120), f"the nodes do not come up{cluster.logs()}"
        yield cluster
        cluster.call("scancel", "--state=PENDING", "--me")
        cluster.call("scancel", "--me")
        wait_until(lambda: not cluster.jobs(), 60)


def configure(directory: Path) -> None:
    """Write slurm.conf and munge's key."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    for name in ("state", "spool-n1", "spool-n2", "munge"):
        (directory / name).mkdir()
    (directory / "munge").chmod(0o711)
    key = directory / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    host = socket.gethostname().split(".")[0]
    (directory / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=ports, directory=directory))


def start(command: list[str], cluster: Cluster, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        environment = {**os.environ, **cluster.environment}
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
