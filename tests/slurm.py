"""A SLURM cluster of one node, on loopback, in a folder of its own, on ports that were free."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
WAIT_S = 60.0
# without cgroups and accounting, which need a machine of its own; nobody measures its memory
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
CommunicationParameters=NoAddrCache,NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=64000
PartitionName=main Nodes={host} Default=YES
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs.

    Attributes
    ----------
    environment
        What its clients need besides their own.
    folder
        With its logs.
    """

    environment: dict[str, str]
    folder: Path

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a client, and return what it says."""
        environment = os.environ | self.environment
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True, text=True, check=False, env=environment, cwd=cwd,
        )  # fmt: skip
        assert done.returncode == 0, f"{command[0]}: {done.stderr}"
        return done.stdout

    def ended(self, job: str) -> dict[str, tuple[str, str]]:
        """Wait for a job, and return state and exit code of each task, by its index."""
        until = time.monotonic() + WAIT_S * 3
        while self.run("squeue", "-h", "-j", job, "-t", "pending,running,completing"):
            assert time.monotonic() < until, self.run("scontrol", "show", "job", job)
            time.sleep(0.2)
        tasks = {}
        for line in self.run("scontrol", "show", "job", "-o", job).splitlines():
            said = dict(word.split("=", 1) for word in line.split() if "=" in word)
            tasks[said.get("ArrayTaskId", "")] = said["JobState"], said["ExitCode"]
        return tasks


def missing() -> str:
    """Return why there can be no cluster; nothing if there can."""
    if getpass.getuser() != "root":
        return "it starts as root"
    absent = [name for name in PROGRAMS if _program(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


@contextmanager
def started() -> Iterator[Slurm]:
    """Start a cluster, wait until its node is idle, and end it with its jobs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        folder.chmod(0o755)  # munge's clients pass through it
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        controller_port, node_port = _free_ports(2)
        configuration = folder / "slurm.conf"
        configuration.write_text(CONFIGURATION.format_map(locals()))
        slurm = Slurm({"SLURM_CONF": str(configuration)}, folder)
        files = [f"--{n}-file={folder}/munge.{n}" for n in ("key", "log", "pid", "seed")]
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
            ["slurmctld", "-D"],
            ["slurmd", "-D"],
        ):
            stack.enter_context(_daemon(command, slurm))
        until = time.monotonic() + WAIT_S
        while (state := _state(slurm)) != "idle":
            assert time.monotonic() < until, f"the node is {state!r}: {_logs(folder)}"
            time.sleep(0.2)
        try:
            yield slurm
        finally:
            slurm.run("scancel", "--user=root")
            while slurm.run("squeue", "-h"):
                time.sleep(0.2)


@contextmanager
def _daemon(command: list[str], slurm: Slurm) -> Iterator[None]:
    """Run a program until the body ends."""
    program = _program(command[0])
    assert program is not None
    with (slurm.folder / f"{command[0]}.out").open("wb") as out:
        process = subprocess.Popen(
            [program, *command[1:]], env=os.environ | slurm.environment, stdout=out, stderr=out
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S)


def _state(slurm: Slurm) -> str:
    environment = os.environ | slurm.environment
    command = ["sinfo", "-h", "-o", "%T"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return (done.stdout or done.stderr).strip()


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.[lo][ou][gt]")))
