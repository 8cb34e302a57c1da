"""``--cluster slurm``: jobs of a real SLURM, cancelled meanwhile, and what a file asks for."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tomllib

from qsm_deploy.kernels.errors import DataError, EngineError, UsageError
from qsm_deploy.runtime.cohort.dask.slurm import Jobs, job_script, jobs_from, require_accepted
from tests.runtime.cohort.dask.conftest import Run, run
from tests.runtime.cohort.test_children import NAMES, OURS, maps_of, outcomes_of

EXAMPLE = Path(__file__).parents[4] / "examples/slurm/cluster.toml"
SMALL = 'cores = 1\nmemory = "2G"\njobs_max = 2\ninterface = "lo"\n'


@pytest.fixture
def config(tmp_path):
    """Return a function that writes what the jobs are like."""

    def write(text: str) -> Path:
        path = tmp_path / "jobs.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def on_slurm(slurm, tmp_path, monkeypatch):
    """Return a SLURM whose clients find it, and begin where their logs may lie."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return slurm


@pytest.mark.slow
def test_jobs_come_go_and_are_cancelled_and_no_map_is_missing(
    on_slurm, new_dataset, config, as_they_open, tmp_path
) -> None:
    root = new_dataset(*NAMES)
    as_they_open(r"_localfield\.nii", "time.sleep(0.15)")
    words = ("--bids", root, "--method", "tkd")
    running = Run(*words, "--cluster", "slurm", "--cluster-config", config(SMALL))
    running.until(" s\n", 4)
    jobs = on_slurm.run("squeue", "-h", "-o", "%i %j", "-t", "running").splitlines()
    assert 1 <= len(jobs) <= 2
    assert all(job.endswith(" qsm-deploy") for job in jobs)
    for job in jobs:
        on_slurm.run("scancel", job.split()[0])
    code, _, err = running.end()
    assert code == 0, err
    assert "12/12 done" in err
    assert "Traceback" not in err
    assert run(*words, "-o", tmp_path / "serial")[0] == 0
    alone, shared = maps_of(tmp_path / "serial"), maps_of(root / OURS)
    assert alone.keys() == shared.keys() == {*NAMES}
    for name, chi in alone.items():
        np.testing.assert_array_equal(chi, shared[name])
    assert_ended(on_slurm, tmp_path)


def assert_ended(slurm, folder: Path) -> None:
    """Wait until no job is left, and look for keys."""
    until = time.monotonic() + 30
    while slurm.run("squeue", "-h"):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert not [path for path in folder.iterdir() if "jobqueue" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_ends_the_jobs(
    on_slurm, new_dataset, config, as_they_open, tmp_path, times
) -> None:
    root = new_dataset(*NAMES)
    as_they_open(r"_localfield\.nii", "time.sleep(0.5)")
    words = ("--bids", root, "--method", "tkd", "--cluster", "slurm")
    running = Run(*words, "--cluster-config", config(SMALL))
    running.until(" s\n")
    for _ in range(times):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, _, err = running.end()
    assert (code, "Traceback" in err) == (130, False), err
    told = {name for name, one in outcomes_of(root).items() if one["state"] == "done"}
    assert 0 < len(told) < 12
    assert told <= maps_of(root).keys()
    if times == 1:
        assert f"{len(told)}/12 done" in err
    assert_ended(on_slurm, tmp_path)


def test_a_job_that_slurm_refuses_is_not_waited_for(on_slurm, new_dataset, config) -> None:
    root = new_dataset("sub-01")
    jobs = config(SMALL + 'queue = "nowhere"\n')
    code, out, err = run(
        "--bids", root, "--method", "tkd", "--cluster", "slurm", "--cluster-config", jobs
    )
    assert (code, out) == (4, "")
    assert "SLURM refuses the job: " in err
    assert "invalid partition specified: nowhere" in err
    assert not (root / "derivatives").exists()


@pytest.mark.slow
def test_a_job_that_ends_before_its_worker_is_there(on_slurm, new_dataset, config) -> None:
    jobs = config(SMALL + 'prologue = ["exit 1"]\n')
    words = ("--bids", new_dataset("sub-01"), "--method", "tkd")
    code, out, err = run(*words, "--cluster", "slurm", "--cluster-config", jobs)
    assert (code, out) == (4, "")
    assert "have ended before a worker answered; read " in err
    [log] = Path.cwd().glob("slurm-*.out")
    assert str(log) in err


def test_where_there_is_no_slurm(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineError, match="no sbatch here"):
        require_accepted("")


def test_dry_run_prints_the_job(new_dataset, config, run) -> None:
    root = new_dataset("sub-01")
    jobs = config(
        SMALL
        + 'queue = "short"\naccount = "mri"\nwalltime = "02:00:00"\ngpus = 1\n'
        + 'prologue = ["module load python"]\ndirectives_extra = ["--qos=low"]\n'
    )
    words = ("--bids", root, "--cluster", "slurm", "--cluster-config", jobs, "--dry-run")
    code, out, _ = run(*words)
    assert code == 0
    directives = {line.removeprefix("#SBATCH ") for line in out.splitlines() if "#SBATCH" in line}
    assert directives == {
        *("-J qsm-deploy", "-p short", "-A mri", "-n 1", "--cpus-per-task=1", "--mem=2G"),
        *("-t 02:00:00", "--gres=gpu:1", "--qos=low"),
    }
    *_, prologue, command = out.splitlines()
    assert prologue == "module load python"
    for said in ("--nthreads 1", "--memory-limit 2.00GiB", "--resources GPU=1", "--interface lo"):
        assert said in command
    assert not (root / "derivatives").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cores = 1\nram = 2", "no key 'ram'; there are cores, memory, jobs_max"),
        ("cores = 1", "memory, jobs_max missing"),
        ('cores = "1"', "cores is '1', expected a whole number"),
        (f"cores = {'9' * 400}", "expected a whole number"),
        (f"prologue = {'[' * 3000}", "no TOML"),
        ("cores = true", "cores is True, expected a whole number"),
        ("memory = 2", "memory is 2, expected a text"),
        ('prologue = "module load"', "prologue is 'module load', expected a list of texts"),
        (SMALL + "gpus = 2", "gpus 2; a job makes one map at a time"),
        (SMALL + "jobs_min = 3", "jobs_min up to that"),
        (SMALL.replace("2G", "2X"), "memory: '2X' is not a size"),
        ("cores = ", "no TOML"),
    ],
)
def test_what_a_file_of_jobs_may_not_say(config, text, said) -> None:
    with pytest.raises(UsageError, match="--cluster-config") as refused:
        jobs_from(config(text))
    assert said in str(refused.value)


def test_a_pipe_of_jobs_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "jobs.toml")
    with pytest.raises(DataError, match="no regular file"):
        jobs_from(tmp_path / "jobs.toml")


def test_a_gpu_is_asked_for_on_both_sides(new_dataset, config, run) -> None:
    words = ("--bids", new_dataset("sub-01"), "--cluster", "slurm", "--cluster-config")
    code, _, err = run(*words, config(SMALL), "--device", "cuda:0")
    assert (code, "--device cuda:0 and gpus = 0" in err) == (2, True)
    code, _, err = run(*words, config(SMALL + "gpus = 1"))
    assert (code, "--device auto and gpus = 1" in err) == (2, True)


def test_the_example_is_understood() -> None:
    jobs = jobs_from(EXAMPLE)
    assert jobs == Jobs(**tomllib.loads(EXAMPLE.read_text()))
    assert f"#SBATCH -p {jobs.queue}" in job_script(jobs)
