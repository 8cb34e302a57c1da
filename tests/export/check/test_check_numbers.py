"""The numbers of a comparison, on maps whose difference is known."""

import base64
import gzip
import json
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.check.cases import Case, Compared
from qsm_deploy.export.check.figures import planes_viewer
from qsm_deploy.export.measure.comparison import compare, reference_from, rounded
from qsm_deploy.kernels.bounding_box import box_at
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.reconstruction.preparation import Prepared
from qsm_deploy.runtime.scan.axes import STORED, axes_named
from qsm_deploy.runtime.scan.scan import Scan

PPM = np.float32(1e-3)  # of one ppb


@pytest.fixture(scope="module")
def scan() -> Scan:
    head = head_phantom(Geometry((60, 64, 58)), seed=4)
    return Scan(
        head.local_field_ppm[None],
        head.mask,
        head.geometry,
        nib.Nifti1Header(),
        np.eye(4),
        truth_ppm=head.chi_ppm,
        labels=head.labels,
    )


@pytest.fixture(scope="module")
def chi(scan: Scan) -> np.ndarray:
    return (0.9 * scan.truth_ppm).astype(np.float32)


def compared(chi: np.ndarray, other: np.ndarray, scan: Scan) -> dict:
    return compare(other, reference_from(chi, scan, scan.measured[0]))


def test_equal_maps_differ_by_nothing(chi, scan) -> None:
    row = compared(chi, chi.copy(), scan)
    zero = ("mean_ppb", "median_ppb", "p999_ppb", "max_ppb", "bias_ppb", "nrmse_percent")
    zero += ("hfen_percent", "field_residual_rise", "field_bias_ppb", "region_bias_ppb")
    zero += ("xsim_drop", "nrmse_rise_percent", "nonfinite_voxels")
    assert {name: row[name] for name in zero} == dict.fromkeys(zero, 0)
    assert row["dgm_slope"] == 1
    assert row["xsim_loss"] == pytest.approx(0, abs=1e-12)


def test_an_offset_is_a_bias_of_every_kind_but_no_slope(chi, scan) -> None:
    row = compared(chi, chi + 2 * PPM, scan)
    for name in ("mean_ppb", "median_ppb", "p999_ppb", "max_ppb", "bias_ppb"):
        assert row[name] == pytest.approx(2, rel=1e-3), name
    assert row["field_bias_ppb"] == pytest.approx(2, rel=1e-3)
    assert row["region_bias_ppb"] == pytest.approx(2, rel=1e-3)
    assert row["dgm_slope"] == pytest.approx(1, abs=1e-4)
    assert row["nrmse_percent"] < 0.01


def test_a_scale_is_a_slope_and_an_nrmse(chi, scan) -> None:
    row = compared(chi, chi * np.float32(1.02), scan)
    assert row["dgm_slope"] == pytest.approx(1.02, abs=1e-5)
    assert row["dgm_slope_error"] == pytest.approx(0.02, abs=1e-5)
    assert row["nrmse_percent"] == pytest.approx(2, rel=1e-3)
    assert row["hfen_percent"] == pytest.approx(2, rel=1e-3)


def test_one_wrong_voxel_is_found_and_counts_as_the_largest_alone(chi, scan) -> None:
    other = chi.copy()
    voxel = tuple(int(n) for n in np.argwhere(scan.mask)[1000])
    other[voxel] -= 50 * PPM
    row = compared(chi, other, scan)
    assert row["max_ppb"] == pytest.approx(50, rel=1e-3)
    assert tuple(row["worst_voxel"]) == voxel
    assert row["median_ppb"] == row["p999_ppb"] == 0
    assert row["bias_ppb"] == pytest.approx(-50 / np.count_nonzero(scan.mask), rel=1e-3)


def test_what_lies_outside_the_mask_does_not_count(chi, scan) -> None:
    other = np.where(scan.mask, chi, np.float32(np.nan))
    assert compared(chi, other, scan)["max_ppb"] == 0


def test_a_bias_that_follows_the_field_is_seen_in_its_bins(chi, scan) -> None:
    field = scan.measured[0]
    row = compared(chi, chi + np.float32(0.1) * field, scan)
    bins = row["bias_by_field"]
    found = np.polyfit([b["field_ppm"] for b in bins], [b["mean_ppb"] for b in bins], 1)
    assert found[0] == pytest.approx(100, rel=0.05)  # ppb for each ppm
    assert row["field_bias_ppb"] > 20 * abs(row["bias_ppb"])
    assert sum(b["voxels"] for b in bins) > 0.9 * np.count_nonzero(scan.mask)
    assert all(b["p5_ppb"] <= b["mean_ppb"] <= b["p95_ppb"] for b in bins)


def test_a_region_that_is_off_is_named(chi, scan) -> None:
    other = np.where(scan.labels == Label.PUTAMEN, chi + 3 * PPM, chi)
    row = compared(chi, other, scan)
    off = {r["region"]: r["bias_ppb"] for r in row["regions"] if abs(r["bias_ppb"]) > 1e-3}
    assert off == {"putamen": pytest.approx(3, rel=1e-3)}
    assert row["dgm_slope_error"] > 1e-3


def test_nuclei_of_few_voxels_have_no_slope(chi, scan) -> None:
    labels = np.where(scan.labels == Label.RED_NUCLEUS, 0, scan.labels)
    for few in np.argwhere(scan.labels == Label.RED_NUCLEUS)[:4]:
        labels[tuple(few)] = Label.RED_NUCLEUS
    row = compared(chi, chi * np.float32(1.02), replace(scan, labels=labels))
    assert "red nucleus" in {r["region"] for r in row["regions"]}
    assert not {"dgm_slope", "dgm_slope_error"} & row.keys()


def test_the_truth_tells_which_map_is_better(chi, scan) -> None:
    worse = chi + np.float32(0.02) * np.sign(scan.measured[0])
    row = compared(chi, worse, scan)
    assert row["xsim_drop"] > 0
    assert row["nrmse_rise_percent"] > 0
    back = compared(worse, chi, scan)
    assert back["xsim_drop"] == pytest.approx(-row["xsim_drop"])


def test_a_map_that_is_not_finite_has_no_other_number(chi, scan) -> None:
    other = chi.copy()
    other[tuple(np.argwhere(scan.mask)[7])] = np.nan
    assert compared(chi, other, scan) == {"nonfinite_voxels": 1}


def test_a_reference_that_is_no_measure_is_refused(chi, scan) -> None:
    broken = chi.copy()
    broken[tuple(np.argwhere(scan.mask)[7])] = np.inf
    with pytest.raises(EngineError, match="reference itself is NaN or Inf at 1 voxels"):
        reference_from(broken, scan, scan.measured[0])
    with pytest.raises(EngineError, match=r"reference is constant in the mask \(0.25 ppm\)"):
        reference_from(np.full_like(chi, 0.25), scan, scan.measured[0])


def test_without_a_field_labels_or_truth_the_rest_remains(chi, scan) -> None:
    bare = Scan(scan.measured, scan.mask, scan.geometry, scan.header, scan.affine)
    row = compare(chi + PPM, reference_from(chi, bare, None))
    assert set(row) == {
        *("nonfinite_voxels", "mean_ppb", "median_ppb", "p999_ppb", "max_ppb", "bias_ppb"),
        *("worst_voxel", "nrmse_percent", "xsim_loss", "hfen_percent"),
    }


def test_the_row_is_json_of_six_digits(chi, scan) -> None:
    row = compared(chi, chi * np.float32(1.001), scan)
    assert json.loads(json.dumps(row)) == row
    assert rounded({"a": [1.23456789, 2], "b": 0.0}) == {"a": [1.23457, 2], "b": 0.0}


def test_the_worst_voxel_is_the_files_and_the_picture_cuts_it(chi, scan) -> None:
    """Whatever the order of storage, and of a box too."""
    shown = []
    for letters in ("RAS", "PIL"):
        axes = axes_named(letters)
        stored = replace(scan.turned(axes), axes=STORED)
        turned = stored.canonical()
        assert turned.stored_letters == letters
        map_ppm = axes.turn(chi)
        wrong = map_ppm.copy()
        worst = axes.voxel((20, 31, 17), scan.geometry.shape)
        wrong[worst] += 50 * PPM
        maps = turned.axes.turn(wrong), turned.axes.turn(map_ppm)
        case = Case("head", Prepared(turned, turned), plan_whole(turned.geometry.shape, 1), False)
        found = compared(maps[1], maps[0], turned)["worst_voxel"]
        assert case.stored_voxel(found) == worst
        corner = (5, 7, 2)
        box = turned.cut(box_at(corner, (32, 32, 32)))
        part = replace(case, prepared=Prepared(box, box), box_of=(turned, corner))
        inside = [n - first for n, first in zip(found, corner, strict=True)]
        assert part.stored_voxel(inside) == worst
        row = {"worst_voxel": list(worst), "where": "here"}
        html = planes_viewer(Compared(case, row, *maps), most_bytes=10**7)
        facts = json.loads(re.findall(r'class="facts">(.*?)</script>', html, re.S)[0])
        shown.append((facts, re.findall(r'class="volume">(.*?)</script>', html)))
    (facts, volumes), (others, other_volumes) = shown
    assert volumes == other_volumes
    for name in ("at", "shape", "rows"):
        assert facts[name] == others[name]
    difference = np.frombuffer(gzip.decompress(base64.b64decode(volumes[2])), "<i2")
    at = difference.reshape(facts["shape"], order="F")[tuple(facts["at"])]
    assert at * facts["rows"][2]["step"] == pytest.approx(50, rel=1e-3)
