"""``--cluster ADDRESS``: workers that die, that come late, that do not fit; who may connect."""

import os
import signal
import time

import numpy as np
import psutil
import pytest

from qsm_deploy.runtime.console.provenance import version
from tests.runtime.cohort.dask.conftest import Run, kill, run
from tests.runtime.cohort.test_children import NAMES, OURS, maps_of, outcomes_of

ONE_RECORDING = " s\n"  # how a line on one that is made ends


def slowly(as_they_open, seconds: float) -> None:
    # a field is opened four times
    as_they_open(r"_localfield\.nii", f"time.sleep({seconds})")


@pytest.mark.slow
def test_a_worker_dies_and_no_map_is_missing(new_dataset, dask, as_they_open, tmp_path) -> None:
    root = new_dataset(*NAMES)
    slowly(as_they_open, 0.1)
    workers = [dask.add_worker() for _ in range(2)]
    running = Run("--bids", root, "--method", "tkd", "--cluster", dask.address)
    running.until(ONE_RECORDING, 3)
    kill(workers[0])
    code, out, err = running.end()
    assert code == 0, err
    # what a child of the dead worker still made is found there
    assert len(out.splitlines()) + err.count("has a map already") == 12
    assert "12/12 done" in err
    assert run("--bids", root, "--method", "tkd", "-o", tmp_path / "serial")[0] == 0
    alone, shared = maps_of(tmp_path / "serial"), maps_of(root / OURS)
    assert alone.keys() == shared.keys() == {*NAMES}
    for name, chi in alone.items():
        np.testing.assert_array_equal(chi, shared[name])
    assert not list(root.rglob(".qsm-deploy-*"))


@pytest.mark.slow
def test_what_kills_its_process_has_no_one_else_blamed(new_dataset, dask, as_they_open) -> None:
    root = new_dataset(*NAMES)
    as_they_open(r"sub-0[369]_localfield\.nii", "os.kill(os.getpid(), signal.SIGKILL)")
    workers = [dask.add_worker() for _ in range(2)]
    code, _, err = run("--bids", root, "--method", "tkd", "--cluster", dask.address)
    assert code == 6, err
    assert maps_of(root).keys() == {*NAMES} - {"sub-03", "sub-06", "sub-09"}
    errors = [line for line in err.splitlines() if line.startswith("qsm-run: error")]
    assert len(errors) == 3
    assert all("signal 9 (SIGKILL), and so did a second one" in line for line in errors)
    for worker in workers:
        assert dask.log_of(worker).count("Registered to") == 1  # none was started anew


@pytest.mark.slow
def test_what_kills_its_worker_each_time(new_dataset, dask, as_they_open) -> None:
    root = new_dataset(*NAMES[:4])
    then = "[os.kill(pid, signal.SIGKILL) for pid in (os.getppid(), os.getpid())]"
    as_they_open(r"sub-02_localfield\.nii", then)
    worker = dask.add_worker()
    code, out, err = run("--bids", root, "--method", "tkd", "--cluster", dask.address)
    assert (code, len(out.splitlines())) == (4, 3), err
    [line] = [line for line in err.splitlines() if line.startswith("qsm-run: error")]
    assert "sub-02: the worker died 4 times while it had sub-02" in line
    assert dask.log_of(worker).count("Registered to") == 5


@pytest.mark.slow
def test_a_map_of_a_worker_that_died_before_it_said_so(new_dataset, dask, as_they_open) -> None:
    root = new_dataset(*NAMES[:4])
    chi = root / OURS / "sub-02/anat/sub-02_Chimap.nii.gz"
    # the child that kills its worker makes the map all the same
    then = f"os.path.exists({str(chi)!r}) or os.kill(os.getppid(), signal.SIGKILL)"
    as_they_open(r"sub-02_localfield\.nii", then)
    dask.add_worker()
    code, out, err = run("--bids", root, "--method", "tkd", "--cluster", dask.address)
    assert (code, len(out.splitlines())) == (0, 3), err
    assert "sub-02: has a map already" in err
    assert outcomes_of(root)["sub-02"]["again"]
    assert maps_of(root).keys() == {*NAMES[:4]}


@pytest.mark.slow
def test_a_late_worker_with_another_model_gets_nothing(
    new_dataset, dask, as_they_open, card, write_model
) -> None:
    root = new_dataset(*NAMES)
    slowly(as_they_open, 0.15)
    first = dask.add_worker()
    running = Run(write_model(card), "--bids", root, "--cluster", dask.address)
    running.until(ONE_RECORDING)
    write_model(card, factor=3.0)
    late = dask.add_worker()
    code, _, err = running.end()
    assert code == 0, err
    [line] = [line for line in err.splitlines() if "takes no part" in line]
    assert "model.onnx is another file there (SHA-256 " in line
    assert os.uname().nodename in line
    assert late.wait(30) == 0  # the nanny, too
    assert first.poll() is None
    outcomes = outcomes_of(root)
    assert outcomes.keys() == {*NAMES}
    assert len({outcome["pid"] for outcome in outcomes.values()}) == 1


@pytest.mark.slow
def test_no_worker_can_open_the_model(new_dataset, dask, as_they_open, card, write_model) -> None:
    root = new_dataset("sub-01")
    as_they_open(r"model\.onnx$", "os.kill(os.getpid(), signal.SIGKILL)")
    dask.add_worker()
    code, out, err = run(write_model(card), "--bids", root, "--cluster", dask.address)
    assert (code, out) == (6, "")
    assert "takes no part: its process died of signal 9 (SIGKILL)" in err
    assert err.splitlines()[-1].startswith("qsm-run: error: no worker fits; ")
    assert not (root / "derivatives").exists()


@pytest.mark.slow
def test_a_worker_of_another_version(new_dataset, dask, tmp_path) -> None:
    root = new_dataset("sub-01")
    other = tmp_path / "other" / "qsm_deploy-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: qsm-deploy\nVersion: 9.9\n")
    dask.environment["PYTHONPATH"] = str(other.parent)
    worker = dask.add_worker()
    words = ("--bids", root, "--method", "tkd", "--cluster", dask.address)
    code, out, err = run(*words)
    assert (code, out) == (4, ""), err
    assert f"127.0.0.1 takes no part: qsm-deploy is 9.9, here it is {version()}" in err
    assert worker.wait(30) == 0
    del dask.environment["PYTHONPATH"]
    dask.add_worker()
    assert run(*words)[0] == 0


@pytest.mark.slow
def test_a_gpu_is_sought_where_a_worker_says_that_it_has_one(new_dataset, dask) -> None:
    root = new_dataset("sub-01")
    plain = dask.add_worker()
    words = ("--bids", root, "--method", "tv", "--device", "cuda:7", "--cluster", dask.address)
    running = Run(*words)
    running.until("waiting for a worker with --resources GPU=1")
    dask.add_worker("--resources", "GPU=1")
    code, _, err = running.end()
    assert code == 4, err
    assert "no worker fits; " in err  # here, none has a GPU
    assert plain.poll() is None


@pytest.mark.slow
def test_an_interrupt_lets_what_runs_end(new_dataset, dask, as_they_open) -> None:
    root = new_dataset(*NAMES)
    slowly(as_they_open, 0.25)
    workers = [dask.add_worker() for _ in range(2)]
    running = Run("--bids", root, "--method", "tkd", "--cluster", dask.address)
    running.until(ONE_RECORDING)
    time.sleep(0.3)
    running.process.send_signal(signal.SIGINT)
    code, _, err = running.end()
    assert code == 130, err
    made = maps_of(root)
    assert 1 < len(made) < 12
    assert outcomes_of(root).keys() == made.keys()
    assert f"{len(made)}/12 done" in err
    for worker in workers:  # they stay, without their children
        assert worker.poll() is None
        processes = psutil.Process(worker.pid).children(recursive=True)
        assert not [p for p in processes if "qsm_deploy.runtime.cohort.child" in str(p.cmdline())]
    words = ("--bids", root, "--method", "tkd", "--cluster", dask.address, "--resume")
    assert run(*words)[0] == 0
    assert maps_of(root).keys() == {*NAMES}


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(new_dataset, dask, as_they_open) -> None:
    root = new_dataset(*NAMES[:4])
    slowly(as_they_open, 30.0)
    dask.add_worker()
    running = Run("--bids", root, "--method", "tkd", "--cluster", dask.address)
    while not list(root.rglob(".qsm-deploy-*")):
        time.sleep(0.05)
    began = time.monotonic()
    for _ in range(2):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    code, _, err = running.end()
    assert (code, "Traceback" in err) == (130, False), err
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_the_scheduler_ends_meanwhile(new_dataset, dask, as_they_open) -> None:
    root = new_dataset(*NAMES[:4])
    slowly(as_they_open, 0.25)
    dask.add_worker()
    running = Run("--bids", root, "--method", "tkd", "--cluster", dask.address)
    running.until(ONE_RECORDING)
    kill(dask.processes[0])
    code, _, err = running.end()
    assert code == 4, err
    assert "Traceback" not in err
    assert "the scheduler is gone" in err
