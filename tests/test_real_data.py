"""The default method and the bundled networks on real data, through the command lines."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label

from qsm_deploy.calibration.phantom.phantom import local_field
from qsm_deploy.export.cli import main as export
from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.runtime.cli import main as reconstruct
from qsm_deploy.runtime.metrics.metrics import correlation, field_residual, nrmse, xsim
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volume, nifti_bytes
from qsm_deploy.runtime.scan.params import load_params
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan

NETWORK = ("--method", "tv-unet")


@pytest.fixture(scope="module")
def ir2qsm(kept_traces, tmp_path_factory):
    """Export the bundled IR2QSM demo."""
    path = tmp_path_factory.mktemp("model") / "ir2qsm.onnx"
    assert export(["--model", "ir2qsm", "-o", str(path), "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def in_vivo(shared):
    """Return the folder of a patient with an intracerebral haemorrhage at 3 T."""
    return shared / "data" / "invivo_haemorrhage"


@pytest.fixture(scope="module")
def cosmos(shared, tmp_path_factory):
    """Return a folder with a real COSMOS map, and its field simulated with noise."""
    source, folder = shared / "data" / "cosmos2016", tmp_path_factory.mktemp("cosmos")
    chi = load_volume(source / "chi_cosmos_ppm.nii.gz")
    mask = load_on_grid(source / "mask.nii.gz", chi).data > 0
    rng = np.random.default_rng(11)
    field = local_field(chi.data, mask, chi.geometry, noise_ppm=0.0025, rng=rng)
    volumes = {"field": field, "mask": mask.astype(np.uint8), "chi": chi.data * mask}
    for name, volume in volumes.items():
        content = nifti_bytes(volume, chi.affine, like=chi.header)
        (folder / f"{name}.nii.gz").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def scan(in_vivo):
    """Return the field in ppm; the "truth" is another network's map, for comparison."""
    files = ScanFiles(
        (in_vivo / "tissue_phase_rad.nii.gz",),
        in_vivo / "mask.nii.gz",
        in_vivo / "chi_msqsm_ppm.nii.gz",
    )
    return load_scan(files, Reading(units="rad", from_file=load_params(in_vivo / "params.json")))


@pytest.fixture(scope="module")
def run(in_vivo, tmp_path_factory):
    """Return a function that reconstructs the field with a network."""

    def run(*model):
        chi = tmp_path_factory.mktemp("chi") / "chi.nii.gz"
        words = [*model, in_vivo / "tissue_phase_rad.nii.gz", "-m", in_vivo / "mask.nii.gz"]
        words += ["--params", in_vivo / "params.json", "--units", "rad", "-o", chi, "--quiet"]
        assert reconstruct([str(word) for word in words]) == 0
        return chi

    return run


@pytest.fixture(scope="module")
def bundled(run):
    return load_volume(run(*NETWORK))


@pytest.fixture(scope="module")
def plain_tkd(scan):
    return scan.mask * tkd(scan.measured[0], scan.geometry, threshold=0.12, pad_voxels=8)


@pytest.fixture(scope="module")
def variation(run):
    """Return the map of the default method, which the network corrects."""
    return load_volume(run()).data


@pytest.fixture(scope="module")
def best_tkd(cosmos):
    """Return NRMSE and XSIM of TKD at the threshold that suits this truth best."""
    field, mask, chi = (cosmos / f"{n}.nii.gz" for n in ("field", "mask", "chi"))
    scan = load_scan(ScanFiles((field,), mask, chi), Reading())
    maps = [
        scan.mask * tkd(scan.measured[0], scan.geometry, threshold=t, pad_voxels=8)
        for t in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
    ]
    errors = [nrmse(chi, scan.truth_ppm, scan.mask) for chi in maps]
    best = int(np.argmin(errors))
    assert 0 < best < len(maps) - 1
    return errors[best], xsim(maps[best], scan.truth_ppm, scan.mask)


class TestInVivo:
    def test_the_grid_is_kept(self, bundled, in_vivo):
        field = nib.load(in_vivo / "tissue_phase_rad.nii.gz")
        np.testing.assert_array_equal(bundled.affine, field.affine)
        for code in ("qform_code", "sform_code"):
            assert bundled.header[code] == field.header[code]

    def test_it_agrees_with_another_network(self, bundled, variation, scan):
        ours, base = (
            correlation(chi, scan.truth_ppm, scan.mask) for chi in (bundled.data, variation)
        )
        assert ours > base - 0.01 > 0.86

    def test_it_explains_the_field_as_total_variation_does(self, bundled, variation, scan):
        ours, base = (
            field_residual(chi, scan.measured[0], scan.mask, scan.geometry)
            for chi in (bundled.data, variation)
        )
        assert ours < 1.03 * base < 0.3

    def test_it_is_no_noisier_than_tkd(self, bundled, plain_tkd, scan):
        assert bundled.data[scan.mask].std() < plain_tkd[scan.mask].std()

    def test_the_haemorrhage_stays_strongly_paramagnetic(self, bundled, scan):
        haemorrhage = largest_regions(scan.truth_ppm > 0.25, 1)[0]
        assert haemorrhage.sum() > 500
        assert bundled.data[haemorrhage].mean() > 0.4

    def test_diamagnetic_spots_keep_their_sign_and_strength(self, bundled, variation, scan):
        for spot in largest_regions(scan.truth_ppm < -0.15, 6):
            assert bundled.data[spot].mean() < 0.97 * variation[spot].mean() < 0

    @pytest.mark.slow
    def test_ir2qsm_gets_voxels_that_it_was_trained_on(self, ir2qsm, in_vivo, capsys):
        words = [ir2qsm, in_vivo / "tissue_phase_rad.nii.gz", "-m", in_vivo / "mask.nii.gz"]
        words += ["--params", in_vivo / "params.json", "--units", "rad", "--dry-run"]
        assert reconstruct([str(word) for word in words]) == 0
        said = capsys.readouterr()
        assert "note: resampled to 1.001 mm for ir2qsm, and the map back" in said.err
        assert "network's grid" in said.out


class TestCosmos:
    def scores(self, folder, tmp_path, *model):
        report = tmp_path / "run.json"
        words = [*model, folder / "field.nii.gz", "-m", folder / "mask.nii.gz"]
        words += ["--truth", folder / "chi.nii.gz", "-o", tmp_path / "chi.nii.gz"]
        words += ["--report", report, "--quiet"]
        assert reconstruct([str(word) for word in words]) == 0
        return json.loads(report.read_text())["metrics"]

    def test_tv_unet_is_well_below_the_best_tkd(self, cosmos, best_tkd, tmp_path):
        metrics = self.scores(cosmos, tmp_path, *NETWORK)
        assert metrics["nrmse_percent"] < 0.85 * best_tkd[0]
        assert metrics["xsim_uniform5"] > best_tkd[1]

    def test_total_variation_by_default_is_below_that(self, cosmos, best_tkd, tmp_path):
        metrics = self.scores(cosmos, tmp_path)
        assert metrics["nrmse_percent"] < 0.7 * best_tkd[0]
        assert metrics["xsim_uniform5"] > 0.75

    @pytest.mark.slow
    def test_the_ir2qsm_demo_gives_a_map_of_this_head(self, cosmos, ir2qsm, tmp_path):
        metrics = self.scores(cosmos, tmp_path, ir2qsm)
        assert metrics["correlation"] > 0.7


def largest_regions(mask, count):
    """Return the largest connected regions of a mask, as masks."""
    regions, _ = label(mask)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return [regions == n for n in np.argsort(sizes)[::-1][:count]]
