"""What a large cohort takes, a section for each question, each with a key in one file.

python benchmarks/bench_scale.py storage -o benchmarks/results/scale.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
from common import Row, parser, say
from distributed import Client
from distributed.protocol.pickle import dumps

from qsm_deploy.export.bench.machine import machine
from qsm_deploy.runtime.bids.search import find_recordings
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.dask.workplace import Workplace, alike, answer
from qsm_deploy.runtime.cohort.outcomes import told_outcomes
from qsm_deploy.runtime.cohort.reconstructing import CohortReconstructor
from qsm_deploy.runtime.cohort.sharding import Shard
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.methods.method import Method

SHAPE = (160, 192, 160)
RECORDINGS, COHORT_SHAPE, TURNS = 24, (96, 96, 96), 3
SAMPLED_S = 0.1  # how often memory is looked at
# the susceptibility-weighted acquisition of UK Biobank: PMC5770339, table 1
STUDY_SHAPE, STUDY_VOXEL_MM, STUDY_ECHOES_S = (256, 288, 48), (0.8, 0.8, 3.0), (0.0094, 0.020)
SUBJECTS, SHARDS = 4000, 100
SMALL_SHAPE, FEW, MANY, WORKERS, MORE_TURNS = (48, 48, 48), 8, 48, 2, 7
FOLDER_EVENTS = ("os.listdir", "os.scandir")


def storage(folder: Path) -> list[Row]:
    """Return the bytes of a map of a head in each type, and the error of whole ppb."""
    head = folder / "head"
    words = ["qsm-phantom", head, "--shape", *SHAPE, "--seed", "1", "-q"]
    subprocess.run([str(word) for word in words], check=True)
    exact = folder / "float32.nii.gz"
    rows = []
    for method in ("tv", "tv-unet", "tkd"):
        sizes = {}
        for dtype in ("float32", "int16"):
            chi = folder / f"{dtype}.nii.gz"
            words = ["qsm-run", head / "field.nii.gz", "-m", head / "mask.nii.gz", "-o", chi]
            words += ["--method", method, "--out-dtype", dtype, "--force", "-q"]
            subprocess.run([str(word) for word in words], check=True, capture_output=True)
            sizes[f"{dtype}_bytes"] = chi.stat().st_size
        read, kept = (nib.load(path).get_fdata() for path in (chi, exact))
        row = {"map": method, "shape": SHAPE, **sizes}
        row["ratio"] = round(sizes["float32_bytes"] / sizes["int16_bytes"], 2)
        row["largest_error_ppb"] = round(1000 * float(np.abs(read - kept).max()), 4)
        rows.append(say(row))
    return rows


def local(folder: Path) -> list[Row]:
    """Return the time and the memory of a cohort in one process of all cores, and in one a core.

    Both are run in turns; the ratio is the median of those of the turns. Memory is looked at in
    runs of its own, which that slows down.
    """
    dataset = cohort(folder / "study", RECORDINGS, COHORT_SHAPE)
    cores = len(os.sched_getaffinity(0))
    ways: dict[str, list[object]] = {
        name: ["qsm-run", "--bids", dataset, "-o", folder / name, "--force", "-q", *how]
        for name, how in (("one", ()), ("children", ("--cluster", f"local:{cores}")))
    }
    turns = [{name: seconds(words) for name, words in ways.items()} for _ in range(TURNS)]
    ratios = sorted(round(turn["one"] / turn["children"], 2) for turn in turns)
    row: Row = {"made_by": "tv", "recordings": RECORDINGS, "shape": COHORT_SHAPE}
    row |= {"cores": cores, "ratio": statistics.median(ratios), "ratios": ratios}
    for name, words in ways.items():
        row[f"seconds_{name}"] = round(statistics.median(turn[name] for turn in turns), 2)
        row[f"peak_mib_{name}"] = round(peak_mib(words))
    row["largest_difference_ppb"] = largest_difference_ppb(folder / "one", folder / "children")
    return [say(row)]


def seconds(words: Sequence[object]) -> float:
    """Return how long a command takes."""
    began = time.perf_counter()
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def cohort(root: Path, recordings: int, shape: Sequence[int]) -> Path:
    """Return a dataset of the local fields of drawn heads."""
    root.mkdir()
    about = {"Name": "Drawn heads", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    for number in range(1, recordings + 1):
        name, head = f"sub-{number:03}", root.parent / "head"
        words = ["qsm-phantom", head, "--shape", *shape, "--seed", number, "-q", "--force"]
        subprocess.run([str(word) for word in words], check=True, capture_output=True)
        anat = root / name / "anat"
        anat.mkdir(parents=True)
        for drawn, suffix in (("field", "localfield"), ("mask", "mask")):
            (head / f"{drawn}.nii.gz").rename(anat / f"{name}_{suffix}.nii.gz")
        (anat / f"{name}_localfield.json").write_text('{"Units": "ppm"}')
    return root


def peak_mib(words: Sequence[object]) -> float:
    """Return the most memory that a command and its children take."""
    most = 0.0
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, _memory_mib(process.pid))
            time.sleep(SAMPLED_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [*map(str, words)])
    return most


def _memory_mib(pid: int) -> float:
    """Return what a process and all below it take, what several share counted once."""
    found = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                found += one.memory_full_info().pss / 2**20
    return found


def largest_difference_ppb(one: Path, other: Path) -> float:
    """Return by how much the maps of two derivative datasets differ."""
    differences = [
        1000 * float(np.abs(nib.load(path).get_fdata() - _twin(path, one, other)).max())
        for path in sorted(one.rglob("*_Chimap.nii.gz"))
    ]
    return round(max(differences), 6)


def _twin(path: Path, one: Path, other: Path) -> np.ndarray:
    twin: np.ndarray = nib.load(other / path.relative_to(one)).get_fdata()
    return twin


def scans(folder: Path) -> list[Row]:
    """Return the CPU time of one scan of a large study's acquisition, in one thread."""
    words = ["qsm-phantom", folder / "drawn", "--shape", *STUDY_SHAPE, "--seed", "1", "-q"]
    words += ["--voxel-size", *STUDY_VOXEL_MM, "--background", "--echoes", *STUDY_ECHOES_S]
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    drawn = folder / "drawn"
    echoes = range(1, len(STUDY_ECHOES_S) + 1)
    phase = ["--phase", *(drawn / f"phase{n}.nii.gz" for n in echoes)]
    phase += ["--magnitude", *(drawn / f"magnitude{n}.nii.gz" for n in echoes)]
    phase += ["--echo-times", *STUDY_ECHOES_S, "--field-strength", "3"]
    rows = []
    for begins, files in (("local field", [drawn / "field.nii.gz"]), ("two echoes", phase)):
        for method in ("tkd", "tv", "tv-unet"):
            words = ["qsm-run", *files, "-m", drawn / "mask.nii.gz", "--method", method]
            words += ["--threads", "1", "-o", folder / "chi.nii.gz", "--force", "-q"]
            spent = sorted(cpu_seconds(words) for _ in range(TURNS))
            row: Row = {"begins_with": begins, "made_by": method, "shape": STUDY_SHAPE}
            row |= {"voxel_size_mm": STUDY_VOXEL_MM, "cpu_seconds": spent[TURNS // 2]}
            rows.append(say(row | {"cpu_seconds_all": spent}))
    words = ["qsm-run", "--version"]
    rows.append(say({"begins_with": "nothing", "cpu_seconds": cpu_seconds(words)}))
    return rows


def cpu_seconds(words: Sequence[object]) -> float:
    """Return the CPU time that a command takes, with all its threads."""
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [*map(str, words)])
    return round(used.ru_utime + used.ru_stime, 2)


def search(folder: Path) -> list[Row]:
    """Return how many folders are opened, and how long that takes, in a dataset of many."""
    root = folder / "study"
    root.mkdir()
    about = {"Name": "Names", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    for number in range(SUBJECTS):
        anat = root / f"sub-{number:06}" / "anat"
        anat.mkdir(parents=True)
        for echo in (1, 2):
            for part in ("phase", "mag"):
                (anat / f"sub-{number:06}_echo-{echo}_part-{part}_MEGRE.nii.gz").touch()
    opened: list[object] = []
    sys.addaudithook(lambda event, given: event in FOLDER_EVENTS and opened.append(given[0]))
    rows = []
    for shard in (None, Shard(1, SHARDS)):
        opened.clear()
        began = time.perf_counter()
        has = None if shard is None else shard.has
        found = find_recordings(root, None, None, root / "derivatives" / "qsm-deploy", has)
        row: Row = {"subjects": SUBJECTS, "shard": str(shard or "all")}
        row |= {"recordings": len(found.recordings), "folders_opened": len(opened)}
        rows.append(say(row | {"seconds": round(time.perf_counter() - began, 3)}))
    return rows


def dask(folder: Path) -> list[Row]:
    """Return what a small recording adds in two processes and on two Dask workers, and in bytes.

    What starting takes is in many recordings as in few, and not counted.
    """
    dataset = cohort(folder / "study", MANY, SMALL_SHAPE)
    about = folder / "scheduler.json"
    where = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    with ExitStack() as stack:

        def start(*words: str) -> psutil.Popen:
            command = [sys.executable, "-m", "dask", *words]
            process = psutil.Popen(command, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        scheduler = start("scheduler", *where, "--scheduler-file", str(about))
        for _ in range(WORKERS):
            start("worker", "--scheduler-file", str(about), "--nthreads", "1")
        while not about.exists():
            time.sleep(SAMPLED_S)
        address = json.loads(about.read_text())["address"]
        with Client(address) as client:
            client.wait_for_workers(WORKERS)
        before = sum(scheduler.cpu_times()[:2])
        pools = (f"local:{WORKERS}", address)
        turns = [[added_by_each(dataset, pool) for pool in pools] for _ in range(MORE_TURNS)]
        spent = sum(scheduler.cpu_times()[:2]) - before
        processes, workers = (
            {"pool": name, "shape": SMALL_SHAPE, "recordings": [FEW, MANY]}
            | {"ms_each": round(statistics.median(all_)), "all": sorted(map(round, all_))}
            for name, all_ in zip((pools[0], "Dask"), zip(*turns, strict=True), strict=True)
        )
        workers["workers"] = WORKERS
        workers["scheduler_cpu_ms"] = round(1000 * spent / (MORE_TURNS * (MANY + FEW)), 1)
        workers["scheduler_mb"] = round(scheduler.memory_info().rss / 1e6)
    asked = Cohort(dataset, Method("tkd"))
    recording = asked.find().recordings[0]
    outcome = max(
        told_outcomes(asked.outcomes_folder).last.values(), key=lambda one: len(one.line())
    )
    facts = asdict(CohortReconstructor(asked, TerminalLog(quiet=True)).facts)
    place = Workplace(f"qsm-deploy-{uuid.uuid4().hex}", asked, alike(asked), quiet=True)
    workers["plugin_bytes"] = len(dumps(place))
    workers["task_bytes"] = len(dumps((answer, place.name, recording, facts, False)))
    workers["result_bytes"] = len(json.dumps(asdict(outcome)))
    return [say(processes), say(workers)]


def added_by_each(dataset: Path, pool: str) -> float:
    """Return by how much the time of a run grows with each recording [ms]."""
    few = ["--participant-label", *(f"{number:03}" for number in range(1, FEW + 1))]
    words = ["qsm-run", "--bids", dataset, "--method", "tkd", "--force", "-q", "--cluster", pool]
    many_s, few_s = (seconds([*words, *which]) for which in ([], few))
    return 1000 * (many_s - few_s) / (MANY - FEW)


SECTIONS: dict[str, Callable[[Path], list[Row]]] = {
    "storage": storage,
    "local": local,
    "scans": scans,
    "search": search,
    "dask": dask,
}


def main() -> None:
    """Measure the sections that are named, print them and put them in the file."""
    p = parser(__doc__)
    p.add_argument("sections", nargs="+", choices=SECTIONS)
    args = p.parse_args()
    for name in args.sections:
        with tempfile.TemporaryDirectory() as folder:
            result = {"machine": machine(), "rows": SECTIONS[name](Path(folder))}
        if args.output is not None:
            there = json.loads(args.output.read_text()) if args.output.exists() else {}
            args.output.write_text(json.dumps({**there, name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
