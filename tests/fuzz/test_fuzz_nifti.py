"""Damaged NIfTI files: refused, read as if whole, or read with a line that says what is odd."""

import gzip
import random
from collections import Counter
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.errors import QsmDeployError
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles, load_scan
from tests.fuzz.damage import damaged

pytestmark = pytest.mark.slow

SHAPE = (14, 16, 12)
AFFINE = np.eye(4)
AFFINE[:3, :3] = Rotation.from_euler("xz", [17, 8], degrees=True).as_matrix() @ np.diag([1, 1.1, 2])
AFFINE[:3, 3] = -70, -60, -50
HEADER_BYTES = 348
SCALING = slice(112, 120)  # slope and intercept, which nothing else in a file repeats
TRIES = 1500


@pytest.fixture(scope="module")
def whole():
    """Return the bytes of a field and of its mask."""
    rng = np.random.default_rng(7)
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[2:-2, 2:-3, 1:-2] = 1
    field = gaussian_filter(rng.standard_normal(SHAPE), 1).astype(np.float32)
    field *= 0.02 / field.std()
    return [nifti_bytes(v, AFFINE, compress=False) for v in (field * mask, mask)]


def read(folder, contents) -> Scan:
    paths = [folder / name for name in ("field.nii.gz", "mask.nii.gz")]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return load_scan(ScanFiles((paths[0],), paths[1]), Reading())


def same(one: Scan, other: Scan) -> bool:
    return (
        one.mask.shape == other.mask.shape
        and bool((one.mask == other.mask).all())
        and np.allclose(one.measured, other.measured, rtol=1e-5, atol=1e-9)
        and np.allclose(one.geometry.voxel_size_mm, other.geometry.voxel_size_mm, rtol=1e-2)
        and other.geometry.b0_angle_deg(one.geometry.b0_direction) < 2
    )


def outcome(folder, contents, right) -> str:
    try:
        found = read(folder, contents)
    except QsmDeployError:
        return "refused"
    if same(found, right):
        return "the same"
    return "said" if set(found.notes) - set(right.notes) else "silent"


def note(note_counts, what: str, counts: Counter[str]) -> None:
    """Note what became of files: refused, the same, or another map, and a line that says so."""
    seen = Counter({"inputs": counts.total()})
    for outcome, count in counts.items():
        ends = outcome.split()[-1]
        seen[{"refused": "refused", "same": "same"}.get(ends, "other")] += count
    note_counts(what, **seen)


@pytest.mark.parametrize("victim", [0, 1], ids=["field", "mask"])
def test_a_damaged_header_changes_nothing_without_a_word(tmp_path, whole, note_counts, victim):
    dice, counts = random.Random(11 + victim), Counter()
    right = read(tmp_path, whole)
    for _ in range(TRIES):
        contents = list(whole)
        contents[victim] = damaged(whole[victim], dice, within=HEADER_BYTES)
        untouched = contents[victim][SCALING] == whole[victim][SCALING]
        found = outcome(tmp_path, contents, right)
        counts[found if untouched else f"scaling, {found}"] += 1
    assert counts["silent"] == 0, counts
    assert counts["refused"] > TRIES // 3
    assert counts["the same"] > TRIES // 20
    note(note_counts, "NIfTI headers, of a field and of a mask", counts)


@pytest.mark.parametrize("members", [1, 3])
def test_a_damaged_archive_is_refused_or_whole(tmp_path, whole, note_counts, members):
    dice, counts = random.Random(members), Counter()
    right = read(tmp_path, whole)
    cuts = np.linspace(0, len(whole[0]), members + 1).astype(int)
    packed = b"".join(gzip.compress(whole[0][a:b], mtime=0) for a, b in pairwise(cuts))
    for _ in range(TRIES):
        counts[outcome(tmp_path, [damaged(packed, dice), whole[1]], right)] += 1
    assert counts["silent"] == 0, counts
    assert counts["refused"] > TRIES // 2
    note(note_counts, "gzip archives of one and three members", counts)


def test_nifti_2_and_the_other_byte_order(tmp_path, whole, note_counts):
    dice, counts = random.Random(3), Counter()
    image = nib.Nifti1Image.from_bytes(whole[0])
    values = np.asarray(image.dataobj)
    second = nib.Nifti2Image(values, None, nib.Nifti2Header.from_header(image.header))
    swapped = nib.Nifti1Image(values, None, image.header.as_byteswapped(">"))
    swapped.set_qform(AFFINE, 1)
    swapped.set_sform(AFFINE, 1)
    for other in (second, swapped):
        other.set_qform(AFFINE, 1)
        other.set_sform(AFFINE, 1)
        content = other.to_bytes()
        right = read(tmp_path, [content, whole[1]])
        assert same(right, read(tmp_path, whole))
        scaling = slice(176, 192) if other is second else SCALING
        for _ in range(TRIES // 3):
            broken = damaged(content, dice, within=540 if other is second else HEADER_BYTES)
            if broken[scaling] == content[scaling]:
                counts[outcome(tmp_path, [broken, whole[1]], right)] += 1
    assert counts["silent"] == 0, counts
    assert counts["refused"] > TRIES // 6
    note(note_counts, "NIfTI-2 and the other byte order", counts)
