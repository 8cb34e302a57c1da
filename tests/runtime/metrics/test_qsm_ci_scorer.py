"""Our metrics are those of QSM-CI's own scorer, as PyPI has it, but for the blood."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

import qsm_deploy.runtime as qsm
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.metrics.metrics import all_metrics
from qsm_deploy.runtime.scan.agreement import detrended_nrmse_percent

BLOOD = 11
OURS = {
    "nrmse": "nrmse_percent",
    "nrmse_detrend": "nrmse_detrended_percent",
    "nrmse_tissue": "nrmse_tissue_detrended_percent",
    "nrmse_dgm": "nrmse_deep_grey_detrended_percent",
    "dgm_linearity": "dgm_linearity",
    "calc_moment_dev": "calc_moment_ppm_voxels",
    "calc_streak": "calc_streak",
    "correlation": "correlation",
    "xsim": "xsim_uniform5",
    "hfen": "hfen_percent",
}


@pytest.mark.parametrize("method", ["tv", "tkd"])
def test_scores_agree(tmp_path, method):
    """Its blood is the label dilated and not masked again: outside the mask a map is 0.

    Its HFEN filters unmasked volumes; both are 0 outside the mask here.
    """
    geometry = Geometry((64, 72, 60))
    head = head_phantom(geometry, seed=11, noise_ppm=0.0025)
    truth = head.chi_ppm * head.mask
    chi = qsm.reconstruct(
        head.local_field_ppm,
        head.mask,
        method=method,
        voxel_size_mm=geometry.voxel_size_mm,
        b0_direction=geometry.b0_direction,
    )
    volumes = {"recon": chi, "truth": truth, "seg": head.labels, "mask": head.mask.astype(np.uint8)}
    flags = []
    for name, volume in volumes.items():
        path = tmp_path / f"{name}.nii.gz"
        nib.Nifti1Image(volume, np.eye(4)).to_filename(path)
        flags += [f"--{name}", str(path)]
    out = tmp_path / "scores.json"
    command = [sys.executable, "-m", "qsm_ci.qsm_eval", "--kind", "chi", *flags, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    theirs = json.loads(out.read_text())["metrics"]
    ours = all_metrics(chi, truth, head.mask, head.labels)
    for name, our_name in OURS.items():
        assert ours[our_name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    blood = binary_dilation(head.labels == BLOOD, np.ones((3, 3, 3)))
    unmasked = detrended_nrmse_percent(chi[blood].astype(float), truth[blood].astype(float))
    assert unmasked == pytest.approx(theirs["nrmse_blood"], rel=1e-3)
    assert ours["nrmse_blood_detrended_percent"] != pytest.approx(theirs["nrmse_blood"], rel=1e-4)
