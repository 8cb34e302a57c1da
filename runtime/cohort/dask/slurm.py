"""Workers in jobs of SLURM, which come and go with the work: ``--cluster slurm``."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qsm_deploy.kernels.errors import EngineError, UsageError
from qsm_deploy.runtime.console.inputs import require_no_pipe
from qsm_deploy.runtime.job.request import memory_bytes

if TYPE_CHECKING:
    from distributed import Client, Security

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "qsm-deploy"


@dataclass(frozen=True)
class Jobs:
    """The jobs of a cohort; the keys of the file of ``--cluster-config``.

    Attributes
    ----------
    cores, memory
        Of a job, which makes one map at a time; the memory as ``16G``.
    jobs_max, jobs_min
        At once.
    queue, account, walltime
        As SLURM has them: partition, account, ``HH:MM:SS``.
    gpus
        Of a job: 0 or 1.
    prologue
        Lines of shell before the worker starts.
    directives_extra
        What else stands behind ``#SBATCH``, a line each.
    interface
        The network between the computers, such as ``ib0``.
    """

    cores: int
    memory: str
    jobs_max: int
    jobs_min: int = 0
    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    gpus: int = 0
    prologue: Sequence[str] = ()
    directives_extra: Sequence[str] = ()
    interface: str | None = None


LISTS = ("prologue", "directives_extra")
NUMBERS = ("cores", "jobs_max", "jobs_min", "gpus")
MOST = 2**31 - 1
REQUIRED = ("cores", "memory", "jobs_max")


def jobs_from(path: Path) -> Jobs:
    """Return the jobs that a file asks for.

    Raises
    ------
    UsageError
        If it cannot be read, or has other keys, or values of other kinds.
    DataError
        If it is no regular file.
    """
    require_no_pipe(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--cluster-config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--cluster-config {path}: no TOML ({error})") from error
    known = [field.name for field in fields(Jobs)]
    for name, value in content.items():
        if name not in known:
            raise UsageError(f"--cluster-config {path}: no key {name!r}; there are {_list(known)}")
        _require_kind(f"--cluster-config {path}: {name}", name, value)
    if missing := [name for name in REQUIRED if name not in content]:
        raise UsageError(f"--cluster-config {path}: {_list(missing)} missing")
    jobs = Jobs(**content)
    try:
        memory_bytes(jobs.memory)
    except UsageError as error:
        raise UsageError(f"--cluster-config {path}: memory: {error}") from error
    if jobs.gpus > 1:
        raise UsageError(
            f"--cluster-config {path}: gpus {jobs.gpus}; a job makes one map at a time, on one GPU"
        )
    if jobs.cores < 1 or not jobs.jobs_min <= jobs.jobs_max or jobs.jobs_max < 1:
        raise UsageError(f"--cluster-config {path}: cores and jobs_max from 1, jobs_min up to that")
    return jobs


def _require_kind(about: str, name: str, value: Any) -> None:
    if name in LISTS:
        right, kind = _is_list_of_text(value), "a list of texts"
    elif name in NUMBERS:
        right, kind = type(value) is int and 0 <= value <= MOST, "a whole number"
    else:
        right, kind = isinstance(value, str), "a text"
    if not right:
        raise UsageError(f"{about} is {value!r}, expected {kind}")


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _list(names: list[str]) -> str:
    return ", ".join(names)


def options_of(jobs: Jobs) -> dict[str, Any]:
    """Return what dask-jobqueue calls these.

    The memory of a job becomes the limit of the one worker in it, which gives it to its child.
    """
    gpu = jobs.gpus == 1
    return {
        "cores": jobs.cores,
        "processes": 1,
        "memory": f"{memory_bytes(jobs.memory)}B",
        "queue": jobs.queue,
        "account": jobs.account,
        "walltime": jobs.walltime,
        "interface": jobs.interface,
        "job_name": NAME,
        "job_script_prologue": list(jobs.prologue),
        "job_extra_directives": ["--gres=gpu:1"] * gpu + list(jobs.directives_extra),
        "worker_extra_args": ["--resources", "GPU=1"] if gpu else [],
    }


def job_script(jobs: Jobs) -> str:
    """Return the script of a job, with a place for the scheduler's address."""
    made_by = _dask_jobqueue().SLURMJob("SCHEDULER", name=NAME, **options_of(jobs))
    script: str = made_by.job_script()
    return script


def _dask_jobqueue() -> ModuleType:
    """Import what hands in jobs, which else lets the whole process end, done, at an interrupt."""
    before = signal.getsignal(signal.SIGINT)
    from dask_jobqueue import slurm

    signal.signal(signal.SIGINT, before)
    return slurm


class Slurm:
    """Jobs that this process asks for, and whose scheduler is in this process.

    Parameters
    ----------
    jobs
        Which.
    security
        What TLS needs; ``True`` for keys that are made for this run, ``None`` for no TLS.
    """

    def __init__(self, jobs: Jobs, security: "Security | bool | None") -> None:
        self._jobs, self._security = jobs, security
        self.most = jobs.jobs_max
        self._cluster: Any = None

    def connect(self) -> "Client":
        """As :meth:`Source.connect`."""
        from distributed import Client

        require_accepted(job_script(self._jobs))
        self._cluster = _dask_jobqueue().SLURMCluster(
            security=self._security,
            # the keys of a run, readable for the user alone; jobs begin in this folder, too
            shared_temp_directory=os.getcwd(),
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
            **options_of(self._jobs),
        )
        self._cluster.adapt(minimum_jobs=self._jobs.jobs_min, maximum_jobs=self._jobs.jobs_max)
        return Client(self._cluster)

    def require_coming(self) -> None:
        """As :meth:`Source.require_coming`: jobs have ended, and none waits or runs."""
        jobs = [job.job_id for job in self._cluster.workers.values() if job.job_id]
        asked = ["squeue", "--noheader", f"--jobs={','.join(jobs)}"]
        if jobs and not subprocess.run(asked, capture_output=True, check=False).stdout.strip():
            raise EngineError(
                f"the jobs {', '.join(jobs)} have ended before a worker answered; read "
                f"{Path.cwd()}/slurm-{jobs[0]}.out"
            )

    def close(self) -> None:
        """As :meth:`Source.close`: the jobs end."""
        if self._cluster is not None:
            with suppress(TimeoutError):
                self._cluster.close()


def require_accepted(script: str) -> None:
    """Ask SLURM whether it would take a job, for what it refuses later is only logged.

    Raises
    ------
    EngineError
        If it is not there, or refuses.
    """
    try:
        asked = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise EngineError(
            "no sbatch here: --cluster slurm runs where jobs are handed in"
        ) from error
    if asked.returncode:
        raise EngineError(f"SLURM refuses the job: {asked.stderr.strip()}; see --dry-run")
