"""What a worker does with a recording, without a scheduler."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import Reschedule

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.dask import workplace
from qsm_deploy.runtime.cohort.dask.workplace import UnfitError, Workplace, alike, fitted
from qsm_deploy.runtime.cohort.reconstructing import CohortReconstructor
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.job.request import wants_from
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host

GIB = 2**30


def dask_worker(nthreads: int = 1, limit: int | None = None) -> SimpleNamespace:
    """Return what a plugin looks at of a Dask worker."""
    memory = SimpleNamespace(memory_limit=limit)
    state = SimpleNamespace(nthreads=nthreads)
    return SimpleNamespace(address="tcp://here:1", state=state, memory_manager=memory)


@pytest.fixture
def place(new_dataset):
    cohort = Cohort(new_dataset("sub-01", "sub-02"), Method("tkd"))
    made = Workplace("run", cohort, alike(cohort), quiet=True)
    made.setup(dask_worker())
    yield made
    made.teardown(dask_worker())


def first_of(place: Workplace) -> Recording:
    return place._cohort.find().recordings[0]


def test_a_task_that_is_run_again_finds_its_map(place) -> None:
    facts = place.facts()
    first, second = (place.outcome(first_of(place), facts, wait=False) for _ in range(2))
    assert (first["state"], first["again"]) == ("done", False)
    assert (second["state"], second["again"]) == ("done", True)


def test_facts_are_the_same_in_another_process(new_dataset, card, write_model) -> None:
    wants = wants_from(data_consistency=0.1)
    cohort = Cohort(new_dataset("sub-01"), (write_model(card),), wants=wants)
    facts = asdict(CohortReconstructor(cohort, TerminalLog(quiet=True)).facts)
    assert facts["wanted"]["data consistency"] == [0.1, None]
    assert json.loads(json.dumps(facts)) == facts


def test_a_worker_whose_maps_would_be_others_makes_none(place) -> None:
    facts = place.facts()
    others = {**facts, "wanted": {**facts["wanted"], "precision": "int8"}}
    with pytest.raises(UnfitError, match="its maps have precision none, not int8"):
        place.outcome(first_of(place), others, wait=False)
    assert not list(place._cohort.derivative.root.rglob("*_Chimap.nii.gz"))


def test_a_worker_that_is_told_to_end_blames_no_recording(place, monkeypatch) -> None:
    facts = place.facts()
    worker = place._worker
    before = worker.outcome

    def ends_meanwhile(recording, *, wait):
        place._ends = True
        worker.kill()
        return before(recording, wait=wait)

    monkeypatch.setattr(worker, "outcome", ends_meanwhile)
    with pytest.raises(Reschedule):
        place.outcome(first_of(place), facts, wait=False)


def test_what_must_be_the_same(new_dataset, tmp_path, monkeypatch) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(b"one")
    cohort = Cohort(new_dataset("sub-01"), (model,))
    same = alike(cohort)
    same.require()
    model.write_bytes(b"another")
    with pytest.raises(EngineError, match=r"net\.onnx is another file there"):
        same.require()
    model.write_bytes(b"one")
    shutil.move(cohort.dataset / "dataset_description.json", tmp_path)
    with pytest.raises(EngineError, match=r"cannot read .*/dataset_description\.json \(No such"):
        same.require()
    monkeypatch.setattr(workplace, "version", lambda: "9.9")
    with pytest.raises(EngineError, match=r"it has qsm-deploy 9\.9, here is "):
        same.require()


@pytest.mark.parametrize(
    ("slurm", "asked", "nthreads", "threads"),
    [("", 0, 1, 1), ("3", 0, 64, 3), ("3", 0, 2, 2), ("3", 5, 2, 5)],
)
def test_threads_are_the_workers(monkeypatch, slurm, asked, nthreads, threads) -> None:
    monkeypatch.setattr(workplace, "cores", lambda: int(slurm or 64))
    cohort = Cohort(Path("study"), Method("tkd"), Host(threads=asked))
    assert fitted(cohort, dask_worker(nthreads)).host.threads == threads


def test_on_a_gpu_neither_is_said() -> None:
    cohort = Cohort(Path("study"), Method("tv"), Host(device="cuda:0"))
    assert fitted(cohort, dask_worker(4, 4 * GIB)) == cohort


def test_memory_is_the_workers(monkeypatch) -> None:
    monkeypatch.setattr(workplace, "available_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(workplace, "rss_bytes", lambda: GIB)
    cohort = Cohort(Path("study"), Method("tkd"))

    def limit(worker_limit: int | None, wants: Wants) -> int | None:
        asked = Cohort(cohort.dataset, cohort.maker, wants=wants)
        return fitted(asked, dask_worker(limit=worker_limit)).wants.memory_limit

    assert limit(4 * GIB, Wants()) == 3 * GIB  # without what the Dask worker itself takes
    assert limit(64 * GIB, Wants()) == 8 * GIB
    assert limit(None, Wants()) is None  # --memory-limit 0: what is free then
    assert limit(4 * GIB, Wants(memory_limit=GIB)) == GIB


def test_paths_mean_the_same_in_another_folder(new_dataset, monkeypatch) -> None:
    root = new_dataset("sub-01")
    monkeypatch.chdir(root.parent)
    maker = (Path("net.onnx"), Method("tkd"))
    there = Cohort(Path("study"), maker, html=Path("pages")).from_anywhere()
    monkeypatch.chdir("/")
    assert there.maker == [root.parent / "net.onnx", Method("tkd")]
    assert (there.dataset, there.html, there.output) == (root, root.parent / "pages", None)
    assert asdict(alike(Cohort(root, Method("tkd"))))["sha256"].keys() == {
        root / "dataset_description.json"
    }
