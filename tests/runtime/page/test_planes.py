"""Where planes lie and what their edges are called, in every order of storage and obliquely."""

import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.page.planes import PLANES, Planes, centre_of, voxel_at
from qsm_deploy.runtime.scan.axes import STORED, Axes, axes_named
from qsm_deploy.runtime.scan.scan import Scan

SHAPE, SIZE_MM = (9, 12, 7), (1.0, 0.9, 2.5)
AXIAL, CORONAL, SAGITTAL = PLANES
STORAGES = [
    Axes(order, flips)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]


def affine_of(*degrees: float, about: str = "x") -> np.ndarray:
    """Return an affine whose axes are turned, and whose origin is somewhere."""
    affine = np.eye(4)
    turn = Rotation.from_euler(about, degrees, degrees=True).as_matrix()
    affine[:3, :3] = turn * SIZE_MM
    affine[:3, 3] = -4.3, -6.1, 3.25
    return affine


def scan_of(affine: np.ndarray | None, b0=(0.0, 0.0, 1.0)) -> Scan:
    rng = np.random.default_rng(2)
    geometry = Geometry(SHAPE, SIZE_MM, b0)
    if affine is not None:
        geometry = Geometry.from_affine(SHAPE, affine)
    mask = np.zeros(SHAPE, bool)
    mask[1:-2, 2:-1, 1:-1] = True
    field = np.where(mask, rng.standard_normal(SHAPE), 0).astype(np.float32)
    return Scan(field[None], mask, geometry, nib.Nifti1Header(), affine)


def planes_of(scan: Scan, at=None) -> Planes:
    return Planes(scan.mask, scan.affine, at or centre_of(scan.mask), scan.axes)


def seen(planes: Planes, volume: np.ndarray) -> list:
    """Return all that a picture shows of a volume."""
    cuts = (np.nan_to_num(planes.cut(volume, plane), nan=99).tolist() for plane in PLANES)
    return [(planes.title(p), planes.ends(p), cut) for p, cut in zip(PLANES, cuts, strict=True)]


def test_upright_axes_have_one_letter_and_r_is_on_the_left():
    planes = planes_of(scan_of(affine_of(0)))
    assert planes.ends(AXIAL) == ["R", "L", "P", "A"]
    assert planes.ends(CORONAL) == ["R", "L", "I", "S"]
    assert planes.ends(SAGITTAL) == ["P", "A", "I", "S"]


@pytest.mark.parametrize("letters", ["RAS", "LAS", "PSR", "LPI"])
def test_tilted_axes_have_a_second_letter(letters):
    scan = scan_of(affine_of(20)).turned(axes_named(letters)).canonical()
    planes = planes_of(scan)
    assert planes.ends(AXIAL) == ["R", "L", "Pi", "As"]
    assert planes.ends(CORONAL) == ["R", "L", "Ia", "Sp"]
    assert planes.ends(SAGITTAL) == ["Pi", "As", "Ia", "Sp"]


@pytest.mark.parametrize(("degrees", "letters"), [(14.8, "A"), (15.2, "As"), (-15.2, "Ai")])
def test_fifteen_degrees_are_told(degrees, letters):
    assert planes_of(scan_of(affine_of(degrees))).ends(AXIAL)[-1] == letters


def test_at_45_degrees_a_plane_and_its_edges_are_named_alike():
    planes = planes_of(scan_of(affine_of(45)))
    assert planes.title(AXIAL).startswith("axial, S")
    assert [planes.ends(plane)[-1][0] for plane in PLANES] == ["A", "S", "S"]


@pytest.mark.parametrize("affine", [affine_of(0), affine_of(20), affine_of(12, -30, about="xz")])
def test_planes_are_the_same_in_every_order_of_storage(affine):
    scan = scan_of(affine)
    expected = seen(planes_of(scan.canonical()), scan.canonical().measured[0])
    for storage in STORAGES:
        stored = scan.turned(storage)
        turned = replace(stored, axes=STORED).canonical()
        assert seen(planes_of(turned), turned.measured[0]) == expected
        raw = Planes(stored.mask, stored.affine, storage.voxel(centre_of(scan.mask), SHAPE))
        assert seen(raw, stored.measured[0]) == expected  # of a grid in any axes, too


@pytest.mark.parametrize("letters", ["RAS", "LAS", "PSR", "LPI", "ARI"])
def test_a_voxel_and_the_letters_follow_their_axes(letters):
    scan = scan_of(affine_of(20))
    stored = replace(scan.turned(axes_named(letters)), axes=STORED)
    assert stored.stored_letters == stored.canonical().stored_letters == letters
    voxel = (2, 5, 1)
    marked = np.zeros(SHAPE, bool)
    marked[voxel] = True
    axes = stored.canonical().axes
    x, y, z = axes.inverse.voxel(voxel, SHAPE)
    assert axes.inverse.turn(marked)[x, y, z]
    assert axes.voxel((x, y, z), stored.geometry.shape) == voxel


@pytest.mark.parametrize("degrees", [0, 20, -33])
def test_a_title_tells_where_its_plane_is_and_leads_back_to_it(degrees):
    scan = scan_of(affine_of(degrees))
    at = (3, 8, 2)
    world_mm = scan.affine @ (*at, 1)
    slices = []
    for plane, ends, mm in zip(PLANES[::-1], ("LR", "PA", "IS"), world_mm, strict=False):
        name, letter, number, unit = planes_of(scan, at).title(plane).split()
        assert (name, unit) == (f"{plane.name},", "mm")
        slices.append(float(number) * (1 if letter == ends[1] else -1))
        assert slices[-1] == pytest.approx(mm, abs=0.051)
    assert voxel_at(slices, scan) == at


def test_slices_outside_the_mask_are_told_its_box():
    scan = scan_of(affine_of(0))
    with pytest.raises(
        UsageError, match=r"--slices 90 0 9 lies outside.* R -3.3 to 1.7, A -4.3 to"
    ):
        voxel_at((90, 0, 9), scan)


def test_without_an_affine_stored_voxels_are_named():
    scan = scan_of(None, b0=(0, 1, 0)).canonical()  # y becomes the third axis
    assert scan.stored_letters == "?"
    planes = planes_of(scan, voxel_at((2, 7, 3), scan))
    assert [planes.title(p) for p in PLANES] == [
        "axial, y = 7 (x →, z ↑)",
        "coronal, z = 3 (x →, y ↑)",
        "sagittal, x = 2 (z →, y ↑)",
    ]
    assert planes.ends(AXIAL) == ["?"] * 4
    np.testing.assert_array_equal(
        planes.cut(scan.measured[0], AXIAL)[1, 2], scan.measured[0][planes.box][2, 1, planes.at[2]]
    )
    with pytest.raises(UsageError, match=r"x 1 to 6, y 2 to 10, z 1 to 5 \(stored voxels\)"):
        voxel_at((2, 11, 3), scan)
