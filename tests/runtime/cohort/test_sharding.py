"""Every recording in one shard, for good, found without a look at the others."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.bids.search import find_recordings
from qsm_deploy.runtime.cohort.sharding import Shard, shard_from

COUNT = 7


@pytest.fixture
def large(new_dataset) -> Callable[[range], Path]:
    """Return a function that adds subjects of one to three recordings, by names alone."""
    root = new_dataset()

    def add(subjects: range) -> Path:
        for number in subjects:
            anat = root / f"sub-{number:03}" / "anat"
            anat.mkdir(parents=True)
            (anat.parent / "func").mkdir()
            for n in range(1 + number % 3):
                (anat / f"sub-{number:03}_run-{n}_localfield.nii.gz").touch()
        return root

    return add


def shards_of(root: Path) -> dict[str, int]:
    """Return the shard of every recording."""
    found: dict[str, int] = {}
    for number in range(1, COUNT + 1):
        ours = root / "derivatives" / "qsm-deploy"
        has = Shard(number, COUNT).has
        for recording in find_recordings(root, None, None, ours, has).recordings:
            assert recording.name not in found
            found[recording.name] = number
    return found


def test_every_recording_is_in_one_shard_and_stays_there(large) -> None:
    before = shards_of(large(range(100)))
    assert len(before) == 199
    assert set(before.values()) == set(range(1, COUNT + 1))
    of_subjects = {(name.partition("_")[0], shard) for name, shard in before.items()}
    assert len(of_subjects) == 100  # a subject's recordings stay together
    after = shards_of(large(range(100, 110)))
    assert len(after) > len(before)
    assert after.items() >= before.items()


def test_where_subjects_belong_is_fixed_for_all_versions() -> None:
    assert [int(Shard(k, 3).has("01")) for k in (1, 2, 3)] == [0, 1, 0]
    assert Shard(1, 1).has("anything")


watched: list[str] | None = None


def watch(event: str, given: tuple[object, ...]) -> None:
    if watched is not None and event in ("os.scandir", "os.listdir"):
        watched.append(str(given[0]))


sys.addaudithook(watch)


def test_a_shard_opens_its_own_subjects_only(large) -> None:
    global watched
    root = large(range(100))
    shard = Shard(3, COUNT)
    mine = [f"sub-{n:03}" for n in range(100) if shard.has(f"{n:03}")]
    watched = []
    try:
        find_recordings(root, None, None, root / "derivatives" / "qsm-deploy", shard.has)
        opened = watched
    finally:
        watched = None
    assert 0 < len(opened) < 5 * len(mine) + 5
    assert {part for path in opened for part in Path(path).parts if part.startswith("sub-")} == {
        *mine
    }


def test_shards_together_make_all_maps_and_an_empty_one_is_no_failure(new_dataset, run) -> None:
    root = new_dataset("sub-01_run-1", "sub-01_run-2", "sub-02", "sub-03")
    made = []
    for number in range(1, 6):
        words = ("--bids", root, "--method", "tkd", "--shard", f"{number}/5")
        code, out, err = run(*words)
        assert code == 0
        assert f"shard {number} of 5: " in err
        made += out.splitlines()
        assert run(*words)[:2] == (0, "")  # what is done is kept
    assert len(made) == len(set(made)) == 4
    outcomes = root / "derivatives/qsm-deploy/outcomes"
    assert (outcomes / "shard-002-of-005.jsonl").exists()
    code, out, _ = run("--bids", root, "--status")
    assert (code, out) == (0, "4 recordings: 4 done, 0 failed, 0 missing\n")


@pytest.mark.parametrize(
    ("environment", "text", "shard"),
    [
        ({}, "3/100", Shard(3, 100)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "12",
                "SLURM_ARRAY_TASK_MIN": "2",
                "SLURM_ARRAY_TASK_MAX": "22",
                "SLURM_ARRAY_TASK_STEP": "5",
                "SLURM_ARRAY_TASK_COUNT": "5",
            },
            "auto",
            Shard(3, 5),
        ),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1"}, "auto/100", Shard(7, 100)),
        ({"PBS_ARRAY_INDEX": "4"}, "auto/10", Shard(4, 10)),
        ({"SGE_TASK_ID": "undefined", "PBS_ARRAY_INDEX": "4"}, "auto/10", Shard(4, 10)),
        ({"SGE_TASK_ID": "2", "SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "9"}, "auto", Shard(2, 9)),
        ({"LSB_JOBINDEX": "5", "LSB_JOBINDEX_END": "8"}, "auto", Shard(5, 8)),
        ({"JOB_COMPLETION_INDEX": "0"}, "auto/4", Shard(1, 4)),
        ({"JOB_COMPLETION_INDEX": "3"}, "auto/4", Shard(4, 4)),
    ],
)
def test_which_shard_schedulers_mean(environment, text, shard) -> None:
    assert shard_from(text, environment) == shard


@pytest.mark.parametrize(
    ("environment", "text", "says"),
    [
        ({}, "0/3", "K from 1 to N"),
        ({}, "4/3", "K from 1 to N"),
        ({}, "3", "expected K/N"),
        ({}, "a/b", "expected K/N"),
        ({}, "auto", "no scheduler says which"),
        ({"LSB_JOBINDEX": "0"}, "auto", "no scheduler says which"),
        ({"PBS_ARRAY_INDEX": "4"}, "auto", "of how many is said nowhere; pass --shard auto/N"),
        ({"JOB_COMPLETION_INDEX": "4"}, "auto/4", "number the tasks from 0"),
        (
            # sbatch --array=3,7,8
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "8",
                "SLURM_ARRAY_TASK_STEP": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            "auto",
            "not one range",
        ),
    ],
)
def test_what_is_no_shard(environment, text, says) -> None:
    with pytest.raises(UsageError, match=says):
        shard_from(text, environment)


def test_a_shard_needs_a_dataset(run) -> None:
    code, _, err = run("field.nii.gz", "--shard", "1/2")
    assert code == 2
    assert "--shard needs --bids DATASET" in err
