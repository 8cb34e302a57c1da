"""One head gives one map, bit for bit, in all 48 storages, by every way in."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qsm_deploy.runtime as qsm
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.runtime.card.card import METADATA_KEY, TensorInfo
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.scan.units import ppm_per_unit
from tests.runtime.storages import GRIDS, SHAPE, SPREAD, STORAGES, head, require_one, rotated

TIMES_S = (0.004, 0.008, 0.012)
FIELD_STRENGTH_T = 3
UNET = ("--method", "tkd-unet")
PATCHES = (*UNET, "--patch", "24", "--overlap", "8")
SPATIAL = (
    *("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def run(folder, name, storage, *flags, with_them=(), fields=None):
    """Return the map of qsm-run in the head's axes, and its report."""
    made = head(name)
    paths = [
        made.save(folder / f"field{n}.nii", storage, field, affine)
        for n, (field, affine) in enumerate(fields or [(made.volumes["field"], None)])
    ]
    words = [*flags, *paths, "-m", made.save(folder / "mask.nii", storage, made.volumes["mask"])]
    for volume in with_them:
        saved = made.save(folder / f"{volume}.nii", storage, made.volumes[volume])
        words += [f"--{volume}", saved]
    if made.stated:
        words += ["--b0-direction", *storage.vector(made.stated)]
    words += ["-o", folder / "chi.nii", "--report", folder / "run.json", "-q", "--force"]
    assert main([str(word) for word in words]) == 0
    image, given = nib.load(folder / "chi.nii"), nib.load(paths[0])
    for entry in SPATIAL:
        np.testing.assert_array_equal(image.header[entry], given.header[entry], entry)
    chi = storage.back(image.get_fdata(dtype=np.float32))
    return chi, json.loads((folder / "run.json").read_text())


def maps(folder, name, storages, *flags, **more):
    return [run(folder, name, storage, *flags, **more)[0] for storage in storages]


@pytest.mark.parametrize("name", GRIDS)
def test_any_geometry(tmp_path, name):
    require_one(maps(tmp_path, name, SPREAD, "--method", "tkd"))


@pytest.mark.parametrize(
    ("flags", "with_them"),
    [
        (("--method", "tv"), ()),
        (("--method", "tv", "--robust"), ("magnitude",)),
        (("--method", "medi"), ("magnitude",)),
        (("--method", "ilsqr"), ()),
        (("--method", "tikhonov"), ()),
        (UNET, ()),
        (PATCHES, ()),
        ((*PATCHES, "--data-consistency", "auto"), ()),
        ((*UNET, "--data-consistency", "0.3"), ()),
    ],
    ids=lambda value: " ".join(value),
)
def test_any_method(tmp_path, flags, with_them):
    require_one(maps(tmp_path, "tilted, qform", SPREAD, *flags, with_them=with_them))


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("flags", [("--method", "tkd"), UNET, PATCHES], ids=lambda f: " ".join(f))
def test_all_48(tmp_path, name, flags):
    require_one(maps(tmp_path, name, STORAGES, *flags))


def test_metrics_and_field_residual(tmp_path):
    found = [
        run(tmp_path, "thick slices", s, "--method", "tkd", with_them=("truth", "labels"))[1]
        for s in SPREAD
    ]
    assert found[0]["metrics"]["xsim_uniform5"] > 0.2
    for other in found[1:]:
        assert other["metrics"] == found[0]["metrics"]
        assert other["field_residual"] == found[0]["field_residual"]
