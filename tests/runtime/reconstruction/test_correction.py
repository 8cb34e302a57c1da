"""The data-consistency step on a command line: what it reports, writes and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.kernels.dipole import tikhonov
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import TensorInfo
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.metrics import nrmse
from qsm_deploy.runtime.reconstruction.correction import AUTO
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from qsm_deploy.runtime.sessions.open import open_session


@pytest.fixture(scope="module")
def head():
    return head_phantom(Geometry((36, 40, 32), (1.0, 1.0, 1.4)), seed=3)


@pytest.fixture
def run(card, write_model, write_volume, head, tmp_path):
    """Return a function that reconstructs the head with a network that returns a bad map."""
    affine = np.diag([1.0, 1.0, 1.4, 1.0])
    field = write_volume(head.local_field_ppm, "field.nii.gz", affine)
    mask = write_volume(head.mask.astype(np.uint8), "mask.nii.gz", affine)
    model = write_model(card, factor=0.5)

    def run(*flags: str) -> tuple[int, np.ndarray, dict]:
        words = [model, field, "-m", mask, "-o", tmp_path / "chi.nii.gz", "--force", *flags]
        code = main([str(word) for word in words])
        if code:
            return code, np.empty(0), {}
        sidecar = json.loads((tmp_path / "chi.json").read_text())
        return 0, nib.load(tmp_path / "chi.nii.gz").get_fdata(dtype=np.float32), sidecar

    return run


@pytest.mark.parametrize("flags", [(), ("--dc-iterations", "5")])
def test_the_map_explains_more_of_the_field(run, head, flags, capsys) -> None:
    code, chi, sidecar = run("--data-consistency", "0.03", *flags)
    assert code == 0
    step = sidecar["data_consistency"]
    assert step["lambda"] == 0.03
    assert step["iterations"] == (5 if flags else None)
    assert step["field_residual_before"] > 0.8
    assert step["field_residual_after"] < 0.4
    assert (chi[~head.mask] == 0).all()
    said = capsys.readouterr().err
    assert "lambda 0.03: field residual" in said
    assert ("with sources outside the mask" in said) == bool(flags)
    if flags:
        assert step["support_mm"] == 5
        assert 0 < step["fitted_residual"] < 0.4


def test_conjugate_gradients_on_the_mask_explain_more_than_the_closed_form(run) -> None:
    _, _, closed = run("--data-consistency", "0.01")
    _, _, masked = run("--data-consistency", "0.01", "--dc-iterations", "20")
    after = masked["data_consistency"]["fitted_residual"]
    assert after < closed["data_consistency"]["field_residual_after"]


def test_a_small_weight_leaves_nothing_of_the_network(run, head) -> None:
    _, chi, _ = run("--data-consistency", "1e-4")
    expected = tikhonov(head.local_field_ppm, head.geometry, lam=1e-4, pad_voxels=8) * head.mask
    assert np.linalg.norm(chi - expected) < 0.15 * np.linalg.norm(expected)


def test_auto_is_what_phantoms_favour(run) -> None:
    for flags, iterations in (((), 10), (("--dc-iterations", "3"), 3)):
        step = run("--data-consistency", "auto", *flags)[2]["data_consistency"]
        assert (step["lambda"], step["iterations"]) == (0.05, iterations)


def test_without_it_nothing_is_corrected(run, head) -> None:
    _, chi, sidecar = run()
    np.testing.assert_allclose(chi, 0.5 * head.local_field_ppm * head.mask, atol=1e-7)
    assert "data_consistency" not in sidecar


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--data-consistency", "0"), "neither auto nor a positive number"),
        (("--data-consistency", "nan"), "neither auto nor a positive number"),
        (("--data-consistency", "1e300"), "--data-consistency must be 1e-09 to 1000, got 1e+300"),
        (("--data-consistency", "1e-300"), "--data-consistency must be 1e-09 to 1000"),
        (("--data-consistency", "1", "--dc-iterations", "9" * 20), "must be 1 to 10000"),
        (("--dc-iterations", "5"), "needs --data-consistency"),
        (("--data-consistency", "0.1", "--dc-iterations", "0"), "not a positive whole number"),
    ],
)
def test_bad_flags_are_refused(run, flags, says, capsys) -> None:
    try:
        code = run(*flags)[0]
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_a_phase_has_no_field_to_be_consistent_with(
    card, write_model, write_volume, field, capsys
) -> None:
    phase = TensorInfo("phase_rad", "rad", ("n", 1, "x", "y", "z"))
    model = write_model(replace(card, inputs=(phase,), task="phase->chi"))
    path: Path = write_volume(np.angle(np.exp(40j * field)).astype(np.float32), "phase.nii.gz")
    scanner = ["--echo-time", "0.02", "--field-strength", "3"]
    assert main([str(model), str(path), *scanner, "--data-consistency", "0.1", "-q"]) == 2
    assert "needs a local field" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("left_over_ppm", [0, 0.002, 0.005])
def test_auto_does_no_harm_whatever_background_removal_left(left_over_ppm) -> None:
    geometry = Geometry((96, 112, 96))
    head = head_phantom(geometry, seed=603)
    rng = np.random.default_rng(2)
    left = residual_background(head.mask, geometry, rms_ppm=1.0, rng=rng)
    field = head.local_field_ppm + np.float32(left_over_ppm) * left
    scan = Scan(field[None], head.mask, geometry, nib.Nifti1Header(), np.eye(4))
    session = open_session(BUNDLED_MODEL, "openvino")
    plan = plan_whole(geometry.shape, session.card.divisor)
    chi = reconstruct(session, scan, plan, Stages())
    corrected, _ = AUTO.apply(chi, scan, Stages())
    before, after = (nrmse(x, head.chi_ppm, head.mask) for x in (chi, corrected))
    assert after < before + 1
