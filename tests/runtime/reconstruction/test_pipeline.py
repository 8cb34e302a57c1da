from dataclasses import replace

import numpy as np
import pytest

from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import network_inputs, reconstruct
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan
from qsm_deploy.runtime.sessions.open import open_session


@pytest.fixture
def scan(field, write_volume):
    rotation = np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1.0, 1.2, 2.0])
    return load_scan(ScanFiles((write_volume(field, "field.nii.gz", affine),)), Reading())


def plans(scan, divisor):
    yield plan_whole(scan.mask.shape, divisor)
    for patch, overlap, blend in ((8, 0, "crop"), (8, 3, "hann"), (12, 4, "gaussian")):
        yield plan_patches(scan.mask, divisor, patch, overlap, blend)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_pointwise_network_gives_the_same_whole_and_in_patches(scan, card, write_model, backend):
    session = open_session(write_model(card), backend)
    for plan in plans(scan, card.divisor):
        chi = reconstruct(session, scan, plan, Stages())
        assert chi.dtype == np.float32
        np.testing.assert_allclose(chi, 2 * scan.measured[0], atol=1e-7)


def test_the_tkd_map_is_made_on_the_whole_volume(scan, tkd_card, write_model):
    session = open_session(write_model(tkd_card), "onnxruntime")
    expected = 2 * scan.mask * tkd(scan.measured[0], scan.geometry, threshold=0.2, pad_voxels=4)
    assert scan.geometry.b0_direction == pytest.approx((0, -0.6, 0.8))
    for plan in plans(scan, tkd_card.divisor):
        chi = reconstruct(session, scan, plan, Stages())
        np.testing.assert_allclose(chi, expected, atol=1e-7)


def test_the_card_says_whether_the_tkd_map_is_masked(scan, tkd_card):
    assert tkd_card.tkd is not None
    unmasked = replace(tkd_card, tkd=replace(tkd_card.tkd, masked=False))
    masked = network_inputs(tkd_card, scan)["tkd_chi_ppm"][0]
    assert not masked[~scan.mask].any()
    assert network_inputs(unmasked, scan)["tkd_chi_ppm"][0][~scan.mask].any()


def test_outside_the_mask_the_map_is_zero(scan, card, write_model):
    half = np.zeros_like(scan.mask)
    half[:, 4:8] = scan.mask[:, 4:8]
    session = open_session(write_model(card), "onnxruntime")
    masked = replace(scan, mask=half)
    chi = reconstruct(session, masked, plan_whole(half.shape, 4), Stages())
    assert np.array_equal(chi != 0, half)


def test_a_network_that_returns_nan_is_an_error(scan, card, write_model):
    session = open_session(write_model(card, factor=float("nan")), "onnxruntime")
    with pytest.raises(EngineError, match="NaN or Inf voxels"):
        reconstruct(session, scan, plan_whole(scan.mask.shape, 4), Stages())


def test_stages_take_time_and_memory(scan, card, write_model):
    session = open_session(write_model(card), "onnxruntime")
    stages = Stages()
    reconstruct(session, scan, plan_whole(scan.mask.shape, 4), stages)
    assert list(stages.seconds) == list(stages.peak_bytes) == ["prepare", "inference"]
    with stages("large"):
        ballast = np.ones(40_000_000, dtype=np.uint8)
    assert 0.9 * ballast.nbytes < stages.peak_bytes["large"] - stages.peak_bytes["prepare"]
