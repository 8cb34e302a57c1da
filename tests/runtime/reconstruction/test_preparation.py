"""From any grid to the training's and back: when, how exactly, what is said and refused."""

import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import GeometryLimits
from qsm_deploy.runtime.metrics.metrics import nrmse
from qsm_deploy.runtime.reconstruction.inversion import Needs, Wants
from qsm_deploy.runtime.reconstruction.preparation import Prepared, prepare
from qsm_deploy.runtime.scan.scan import Scan

AXIAL_1MM = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 2.0)
ANY_B0 = GeometryLimits((1.0, 1.0, 1.0), 0.1, None, None)


def needs(limits=AXIAL_1MM, **more) -> Needs:
    return Needs("a network", "local_field_ppm", range(1, 2), limits, **more)


def tilted(degrees: float) -> tuple[float, float, float]:
    return 0.0, math.sin(math.radians(degrees)), math.cos(math.radians(degrees))


def scan_of(shape=(40, 44, 36), voxel=(1.0, 1.0, 1.0), degrees=20.0, **more) -> Scan:
    head = head_phantom(Geometry(shape, voxel, tilted(degrees)), seed=3, noise_ppm=0.0)
    grid = head.geometry
    affine = np.diag([*voxel, 1.0])
    field = head.local_field_ppm[None]
    return Scan(
        field, head.mask, grid, nib.Nifti1Header(), affine, truth_ppm=head.chi_ppm,
        b0_from="the sform (scanner)", **more,
    )  # fmt: skip


def there_and_back(prepared: Prepared, volume: np.ndarray) -> np.ndarray:
    """Return a volume that takes the way of the field there, and the map's back."""
    on_it = prepare(needs(), replace(prepared.measured, measured=volume[None]), Wants())
    return on_it.brought_back(on_it.scan.measured[0])


@pytest.mark.parametrize(
    ("limits", "degrees", "voxel"),
    [
        (AXIAL_1MM, 1.9, (1.0, 1.0, 1.0)),
        (AXIAL_1MM, 0.0, (0.95, 1.06, 1.0)),
        (ANY_B0, 20.0, (1.0, 1.0, 1.0)),
        (GeometryLimits(None, None, None, None), 40.0, (0.5, 0.5, 2.0)),
    ],
)
def test_what_the_training_covers_stays_as_it_is(limits, degrees, voxel) -> None:
    scan = scan_of(degrees=degrees, voxel=voxel)
    prepared = prepare(needs(limits), scan, Wants())
    assert prepared.scan is prepared.measured is scan
    assert (prepared.back, prepared.facts, prepared.departures) == ((), {}, ())


def test_a_tilted_scan_is_turned_and_says_so() -> None:
    scan = scan_of()
    prepared = prepare(needs(), scan, Wants())
    grid = prepared.scan.geometry
    assert grid.b0_direction == (0, 0, 1)
    assert grid.voxel_size_mm == pytest.approx((1, 1, 1))
    assert prepared.measured is scan
    assert prepared.scan.truth_ppm is None
    assert prepared.scan.notes == [
        "turned by 20.0 degrees for a network, and the map back; B0 from the sform (scanner)"
    ]
    assert prepared.departures == ()
    inner = prepared.scan.mask[3:-3, 3:-3, 3:-3]
    assert inner.sum() == prepared.scan.mask.sum()  # a margin all around, into which cubics reach
    box = np.prod([np.ptp(axis) + 1 for axis in np.nonzero(scan.mask)])
    assert prepared.scan.mask.size < 1.9 * box  # the margin counts for much in a head this small


def test_its_own_voxel_size_is_kept_where_that_is_tolerated() -> None:
    prepared = prepare(needs(), scan_of(voxel=(1.06, 1.06, 1.06)), Wants())
    assert prepared.scan.geometry.voxel_size_mm == pytest.approx((1.06,) * 3)
    assert "resampled" not in prepared.scan.notes[0]


def test_other_voxels_are_resampled_first() -> None:
    scan = scan_of((50, 54, 18), (0.8, 0.8, 2.0))
    prepared = prepare(needs(), scan, Wants())
    assert prepared.scan.geometry.voxel_size_mm == (1, 1, 1)
    assert prepared.scan.notes[0].startswith("turned by 20.0 degrees and resampled to 1 mm for a ")
    assert set(prepared.facts) == {"resampled", "turned", "turned_deg"}
    back = prepared.brought_back(prepared.scan.measured[0])
    assert back.shape == scan.mask.shape
    assert not back[~scan.mask].any()


def test_a_network_for_any_b0_is_given_the_voxels_alone() -> None:
    scan = scan_of((50, 54, 18), (0.8, 0.8, 2.0))
    prepared = prepare(needs(ANY_B0), scan, Wants())
    assert prepared.scan.geometry.b0_direction == scan.geometry.b0_direction
    assert prepared.scan.geometry.shape == (40, 43, 36)
    assert prepared.scan.notes[0].startswith("resampled to (1, 1.005, 1) mm for a network")


def test_thick_slices_are_told() -> None:
    notes = prepare(needs(), scan_of((40, 44, 16), (1.0, 1.0, 3.0), 0.0), Wants()).scan.notes
    assert any("slices of 3 mm are interpolated" in note for note in notes)


def test_what_is_smooth_comes_back_as_it_was() -> None:
    scan = scan_of(degrees=20.0)
    x, y, z = np.ogrid[-20:20, -22:22, -18:18]
    blob = np.exp(-(x**2 + y**2 + z**2) / (2 * 3.0**2)).astype(np.float32)
    back = there_and_back(prepare(needs(), scan, Wants()), blob * scan.mask)
    deep = scan.mask.copy()
    for axis in range(3):
        for step in range(-3, 4):
            deep &= np.roll(scan.mask, step, axis)
    assert np.abs(back - blob)[deep].max() < 2e-3


def test_an_axis_that_the_tilt_leaves_alone_is_not_interpolated() -> None:
    scan = scan_of(degrees=20.0)
    noise = np.random.default_rng(0).standard_normal(scan.mask.shape).astype(np.float32)
    noise[:, ...] = noise[:, :1, :1]  # white along x, constant in the plane that is turned
    filled = replace(scan, mask=np.ones_like(scan.mask))
    back = there_and_back(prepare(needs(), filled, Wants()), noise)
    inner = (slice(10, -10),) * 3
    np.testing.assert_allclose(back[inner], noise[inner], atol=1e-4)


def test_the_field_of_the_turned_grid_is_that_of_its_map() -> None:
    scan = scan_of(degrees=20.0)
    prepared = prepare(needs(), scan, Wants())
    native = tkd(scan.measured[0], scan.geometry, threshold=0.2, pad_voxels=8) * scan.mask
    turned = tkd(prepared.scan.measured[0], prepared.scan.geometry, threshold=0.2, pad_voxels=8)
    back = prepared.brought_back(turned)
    errors = [nrmse(chi, scan.truth_ppm, scan.mask) for chi in (native, back)]
    assert errors[1] < errors[0] + 13  # most of it at the rim, of which a small head has much
    wrong = replace(scan.geometry, b0_direction=(0, 0, 1))
    ignored = tkd(scan.measured[0], wrong, threshold=0.2, pad_voxels=8) * scan.mask
    assert nrmse(ignored, scan.truth_ppm, scan.mask) > errors[1] + 15


def test_a_slab_does_not_run_into_itself() -> None:
    scan = scan_of((40, 44, 16), (1.0, 1.0, 4.0), 0.0)
    full = replace(scan, mask=np.ones_like(scan.mask), measured=np.zeros_like(scan.measured))
    full.measured[0, 20, 22, 0] = 1
    prepared = prepare(needs(), full, Wants())
    assert np.abs(prepared.scan.measured[0][20, 22, 61:64]).max() < 0.1
    back = prepared.brought_back(prepared.scan.measured[0])
    assert back[20, 22, 0] > 0.85
    assert np.abs(back[20, 22, 1:]).max() < 0.05


def test_a_volume_too_thin_to_be_resampled_is_refused_by_the_file_s_own_size() -> None:
    scan = scan_of((40, 44, 16), degrees=0.0)
    thin = scan.cut((slice(None), slice(None), slice(6, 11)))
    thin = replace(thin, geometry=replace(thin.geometry, voxel_size_mm=(1.0, 1.0, 0.5)))
    with pytest.raises(GeometryError, match=r"voxel size \(1, 1, 0.5\) mm"):
        prepare(needs(), thin, Wants())


def test_allowed_is_native_and_says_what_it_costs() -> None:
    scan = scan_of((50, 54, 18), (0.8, 0.8, 2.0))
    prepared = prepare(needs(), scan, Wants(allow_geometry=True))
    assert prepared.scan is scan
    voxels, tilt = prepared.departures
    assert "voxel size (0.8, 0.8, 2) mm" in voxels
    assert "expected error about 68 % (2 sin 20 deg)" in tilt


def test_a_wrapped_phase_is_not_turned() -> None:
    scan = replace(scan_of(), quantity="phase_rad")
    with pytest.raises(GeometryError, match=r"20.0 degrees off .* wrapped phase is not turned"):
        prepare(needs(), scan, Wants())


def test_axes_of_a_training_are_given_and_taken_back() -> None:
    scan = scan_of(degrees=0.0)
    prepared = prepare(needs(axes="LPS"), scan, Wants())
    np.testing.assert_array_equal(prepared.scan.measured[0], scan.measured[0][::-1, ::-1])
    back = prepared.brought_back(prepared.scan.measured[0])
    np.testing.assert_array_equal(back, scan.measured[0])
    turned = prepare(needs(axes="LPS"), scan_of(), Wants())
    assert turned.scan.geometry.b0_direction == (0, 0, 1)
    assert turned.brought_back(turned.scan.measured[0]).shape == scan.mask.shape
