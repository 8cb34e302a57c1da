"""Damaged BIDS trees: every recording gets its own map or a line that says why not."""

import json
import math
import os
import random
import shutil
import signal
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import QsmDeployError
from qsm_deploy.runtime.cohort import reconstructing
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.driver import run_cohort
from qsm_deploy.runtime.cohort.pool import ThisProcess
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.job.request import maker_from
from qsm_deploy.runtime.reconstructor import Host, open_reconstructor
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from tests.fuzz.damage import damaged, damaged_json

SHAPE = (16, 18, 16)
BATCHES, TREES_EACH = 6, 40
SECONDS_EACH = 20  # for a tree; one takes a tenth of one
DESCRIPTION = {"Name": "fuzz", "BIDSVersion": "1.10.0"}
PREP = "derivatives/prep/"
POINTERS = (
    "/annex/objects/MD5E-s9--00.nii.gz\n",
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
)
SUFFIXES = ("MEGRE", "T2starw", "GRE", "phase", "magnitude", "phase1", "mask", "localfield", "x")
PIECES = ("_echo-1", "_echo-2", "_part-real", "_run-1", "_sub-02", "_ses-b", "_desc-x", "_", " ")

pytestmark = pytest.mark.slow


class Quiet(TerminalLog):
    """Shows nothing: names may hold what no terminal can show."""

    def __init__(self):
        super().__init__(quiet=True)

    def warn(self, text):
        pass


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".json"):
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(nifti_bytes(content, np.eye(4)))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a dataset of four subjects: echoes, complex parts, and local fields in two places."""
    root = tmp_path_factory.mktemp("tree") / "whole"
    rng = np.random.default_rng(5)
    x, y, z = (2 * n / (size - 1) - 1 for n, size in zip(np.indices(SHAPE), SHAPE, strict=True))
    mask = (x**2 + y**2 + z**2 < 0.8).astype(np.uint8)
    write(root, "dataset_description.json", DESCRIPTION)
    write(root, f"{PREP}dataset_description.json", DESCRIPTION)
    write(root, "MEGRE.json", {"MagneticFieldStrength": 3})
    for echo, time in ((1, 0.005), (2, 0.01)):
        turn = 60 * time * (x * y + 0.3 * np.cos(9 * z))
        noise = rng.uniform(-math.pi, math.pi, SHAPE)
        phase = np.where(mask, np.angle(np.exp(2j * math.pi * turn)), noise)
        stem = f"sub-01/anat/sub-01_echo-{echo}"
        for part, values in (("phase", phase), ("mag", 1.0 + mask)):
            write(root, f"{stem}_part-{part}_MEGRE.nii.gz", values.astype(np.float32))
            write(root, f"{stem}_part-{part}_MEGRE.json", {"EchoTime": time})
    write(root, "sub-01/anat/sub-01_mask.nii.gz", mask)
    for part, values in (("real", np.cos(4 * x + y)), ("imag", np.sin(4 * x + y))):
        stem = f"sub-02/ses-a/anat/sub-02_ses-a_part-{part}_T2starw"
        write(root, f"{stem}.nii.gz", (mask * values).astype(np.float32))
        write(root, f"{stem}.json", {"EchoTime": 0.02, "MagneticFieldStrength": 3})
    write(root, f"{PREP}sub-02/ses-a/anat/sub-02_ses-a_desc-brain_mask.nii.gz", mask)
    for stem in ("sub-03/fmap/sub-03", f"{PREP}sub-04/ses-a/anat/sub-04_ses-a"):
        field = mask * rng.normal(0, 0.03, SHAPE)
        write(root, f"{stem}_localfield.nii.gz", field.astype(np.float32))
        write(root, f"{stem}_localfield.json", {"Units": "ppm"})
        write(root, f"{stem}_mask.nii.gz", mask)
    return root


@pytest.fixture(scope="module")
def run():
    """Return a function that runs a dataset, with the quickest method opened once."""
    host = Host(threads=1)
    maker = maker_from([], method="tkd")
    opened = open_reconstructor(maker, host)

    def run_on(root, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reconstructing, "open_reconstructor", lambda *_, **__: opened)
            return run_cohort(Cohort(root, maker, host, **options), ThisProcess(), Quiet())

    return run_on


@pytest.fixture(scope="module")
def whole(tree, run, tmp_path_factory):
    """Return the maps of the whole dataset by their names."""
    output = tmp_path_factory.mktemp("whole")
    assert run(tree, output=output).failures == []
    maps = {path.name: nib.load(path).get_fdata() for path in maps_in(output)}
    assert len(maps) == 4
    return maps


@pytest.fixture
def watch():
    """Return a context that ends what hangs by an interrupt, which nothing takes for a failure."""

    @contextmanager
    def watched():
        signal.alarm(SECONDS_EACH)
        yield
        signal.alarm(0)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield watched
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def maps_in(output):
    return sorted(output.rglob("*_Chimap.nii.gz"))


def a_file(root, dice, ending=""):
    return dice.choice(sorted(p for p in root.rglob(f"*{ending}") if not p.is_dir()))


def a_folder(root, dice):
    return dice.choice(sorted(p for p in root.rglob("*") if p.is_dir() and not p.is_symlink()))


def another_name(name, dice):
    """Return a name in which something was replaced, put in or left out."""
    at, kind = dice.randrange(len(name)), dice.randrange(6)
    if kind == 0:
        return name.replace("sub-0", f"sub-{dice.choice('0x')}", 1)[:-1] or "x"
    if kind == 1:
        return f"{name[: name.rfind('_')]}_{dice.choice(SUFFIXES)}.nii.gz"
    if kind == 2:
        return name[:at] + dice.choice(PIECES) + name[at:]
    if kind == 3:
        return name[:at] + name[at + 1 :] or "x"
    if kind == 4:
        return name.replace("_", dice.choice(PIECES) + "_", 1)
    return name[:at] + os.fsdecode(bytes([dice.choice((9, 10, 27, 65, 126, 200, 255))])) + name[at:]


def rename(root, dice):
    path = a_file(root, dice)
    path.rename(path.with_name(another_name(path.name, dice)))


def rename_folder(root, dice):
    path = a_folder(root, dice)
    to = path.with_name(
        dice.choice(["sub-01", "sub-09", "ses-b", "anat", another_name("fmap", dice)])
    )
    if not os.path.lexists(to):
        path.rename(to)


def of_another_subject(root, dice):
    path = a_file(root, dice, ".nii.gz")
    words = path.name.split("_")
    others = [f"sub-0{n}" for n in range(1, 5) if f"sub-0{n}" != words[0]]
    path.rename(path.with_name("_".join([dice.choice(others), *words[1:]])))


def move(root, dice):
    path = a_file(root, dice)
    shutil.copy(path, a_folder(root, dice) / path.name, follow_symlinks=False)
    if dice.random() < 0.5:
        path.unlink()


def twin(root, dice):
    path = a_file(root, dice, ".nii.gz")
    name = dice.choice((path.name[:-3], another_name(path.name, dice)))
    shutil.copy(path, path.with_name(name), follow_symlinks=False)


def remove(root, dice):
    a_file(root, dice).unlink()


def remove_folder(root, dice):
    shutil.rmtree(a_folder(root, dice))


def link(root, dice):
    path = a_file(root, dice) if dice.random() < 0.7 else a_folder(root, dice)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(dice.choice((path.name, "../.git/annex/objects/x", "/nowhere", ".", "..")))


def replace(root, dice):
    a_file(root, dice).write_text(dice.choice(("", *POINTERS)))


def exchange(root, dice):
    """Put a folder in the place of a file, or a file in that of a folder."""
    if dice.random() < 0.5:
        path = a_file(root, dice)
        path.unlink()
        path.mkdir()
    else:
        path = a_folder(root, dice)
        shutil.rmtree(path)
        path.write_bytes(b"")


def damage_image(root, dice):
    path = a_file(root, dice, ".nii.gz")
    path.write_bytes(damaged(path.read_bytes(), dice))


def damage_json(root, dice):
    path = a_file(root, dice, ".json")
    text = damaged_json(json.loads(path.read_text()), dice)
    path.write_text(text, encoding="utf-8", errors="replace")


def plainer_json(root, dice):
    path = a_file(root, dice, ".json")
    words = path.name.split("_")
    words.pop(dice.randrange(len(words)))
    if words:
        shutil.copy(path, path.with_name("_".join(words).removesuffix(".json") + ".json"))


DAMAGE = (
    *(rename, rename, rename_folder, of_another_subject, move, twin, remove, remove_folder),
    *(link, replace, exchange, damage_image, damage_json, damage_json, plainer_json),
)


def damage(root, dice):
    """Do one to three kinds of damage, as far as there is something left."""
    for _ in range(dice.randrange(1, 4)):
        try:
            dice.choice(DAMAGE)(root, dice)
        except (OSError, ValueError, IndexError):  # nothing of that kind, or damaged already
            continue


def require_own_sources(path):
    """Check that a map is made of images that lie under its name and have it."""
    content = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    name = path.name.removesuffix("_Chimap.nii.gz")
    levels = [word for word in name.split("_") if word[:4] in ("sub-", "ses-")]
    for uri in content["Sources"]:
        source = Path(uri.removeprefix("bids:source:"))
        words = [word for word in source.name.split("_") if word[:4] in ("sub-", "ses-")]
        assert words == levels, (name, uri)
        assert list(source.parts[:-2][-len(levels) :]) == levels
    assert [part for part in path.parts[:-1] if part[:4] in ("sub-", "ses-")] == levels


@pytest.mark.parametrize("seed", range(BATCHES))
def test_damaged_trees(tree, run, whole, watch, tmp_path, note_counts, seed):
    dice, seen = random.Random(seed), Counter()
    for number in range(TREES_EACH):
        root = tmp_path / f"{number}"
        output = tmp_path / f"maps-{number}"
        shutil.copytree(tree, root)
        damage(root, dice)
        options = {"dry_run": dice.random() < 0.1, "source": dice.choice((None, None, "megre"))}
        try:
            with watch():
                outcome = run(root, output=output, **options)
        except QsmDeployError:
            seen["refused"] += 1
            continue
        assert [f for f in outcome.failures if f.exit_code not in (3, 6)] == []
        assert all(failure.reason for failure in outcome.failures)
        made = maps_in(output)
        assert len(made) == len(outcome.lines) * (not options["dry_run"])
        for path in made:
            require_own_sources(path)
            chi = nib.load(path).get_fdata()
            assert not [n for n, c in whole.items() if n != path.name and np.array_equal(c, chi)]
            seen["as in the whole tree"] += path.name in whole and np.array_equal(
                whole[path.name], chi
            )
        seen.update(failures=len(outcome.failures), maps=len(made), runs=1)
        shutil.rmtree(root)
    assert seen["runs"] > 0.7 * TREES_EACH
    assert seen["failures"] > 0.4 * TREES_EACH
    assert seen["maps"] > 1.2 * TREES_EACH
    assert seen["as in the whole tree"] > TREES_EACH
    maps = {"same": seen["as in the whole tree"]}
    maps["other"] = seen["maps"] - maps["same"]
    recordings = {"refused_recordings": seen["failures"]}
    note_counts("BIDS datasets", inputs=TREES_EACH, refused=seen["refused"], **maps, **recordings)
