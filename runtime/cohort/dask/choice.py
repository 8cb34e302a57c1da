"""Which Dask workers a command line means."""

from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.cohort.dask.address import Scheduler, require_safe, security_from
from qsm_deploy.runtime.cohort.dask.slurm import Jobs, Slurm, job_script, jobs_from
from qsm_deploy.runtime.cohort.pool import Pool
from qsm_deploy.runtime.console.command import needs_extra

SLURM = "slurm"


def pool_from(
    cluster: str,
    config: Path | None,
    tls: Sequence[Path] | None,
    *,
    insecure: bool,
    device: str,
) -> Pool:
    """Return the workers of a scheduler, or of jobs.

    Parameters
    ----------
    cluster
        ``slurm``, or the address of a scheduler.
    config
        What the jobs of SLURM are like.
    tls
        Certificate of an authority, own certificate and key.
    insecure
        Whether to go without TLS beyond this computer.
    device
        Where a network runs.

    Raises
    ------
    UsageError
        If these do not belong together, or are not safe.
    MissingDependencyError
        If the extra is not installed.
    """
    jobs = None
    if cluster == SLURM:
        jobs = slurm_jobs(config)
        if device.startswith("cuda") != (jobs.gpus == 1):
            raise UsageError(
                f"--device {device} and gpus = {jobs.gpus} in {config}: a job has one GPU if it is "
                "to run on it, --device cuda:0, and else none"
            )
    else:
        if config is not None:
            raise UsageError("--cluster-config is of --cluster slurm; drop one")
        require_safe(cluster, has_tls=tls is not None, insecure=insecure)
    with needs_extra("cluster", f"--cluster {cluster}"):
        from qsm_deploy.runtime.cohort.dask.pool import DaskPool

        security = security_from(tls) if tls is not None else None
        if jobs is not None:
            return DaskPool(Slurm(jobs, security or (None if insecure else True)))
        return DaskPool(Scheduler(cluster, security))


def slurm_jobs(config: Path | None) -> Jobs:
    """Return the jobs of ``--cluster slurm``.

    Raises
    ------
    UsageError
        If no file says what they are like, or it is not right.
    """
    if config is None:
        raise UsageError(
            "--cluster slurm needs --cluster-config FILE.toml: cores, memory, jobs_max"
        )
    return jobs_from(config)


def script_from(config: Path | None) -> str:
    """Return the script that SLURM would be handed."""
    jobs = slurm_jobs(config)
    with needs_extra("cluster", "--cluster slurm"):
        return job_script(jobs)
