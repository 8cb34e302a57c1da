"""The methods beside networks, as a user types them: maps, refusals, reports, memory."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

import qsm_deploy.runtime as qsm
from qsm_deploy.calibration.phantom.orientation import tilted
from qsm_deploy.calibration.phantom.phantom import head_phantom, local_field
from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.kernels.errors import DataError, GeometryError, MemoryLimitError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion import grid
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.methods.inversion import RUNNERS
from qsm_deploy.runtime.methods.method import METHODS, Method
from qsm_deploy.runtime.metrics.metrics import nrmse

GRID = Geometry((44, 50, 41), (1.1, 1.0, 1.3), (0.1, -0.3, 0.95))
PLACE = {"voxel_size_mm": GRID.voxel_size_mm, "b0_direction": GRID.b0_direction}


@pytest.fixture(scope="module")
def head():
    """Return a head, its field at 0.0025 ppm of noise, and a magnitude."""
    head = head_phantom(GRID, seed=7, noise_ppm=0.0025)
    magnitude = (1 + 0.05 * head.labels.astype(np.float32)) * head.mask
    return head, magnitude


@pytest.fixture(scope="module")
def files(head, tmp_path_factory):
    """Return the same in files, with the truth, by name."""
    folder = tmp_path_factory.mktemp("head")
    phantom, magnitude = head
    affine = np.diag([*GRID.voxel_size_mm, 1.0])
    volumes = {
        "field": phantom.local_field_ppm,
        "mask": phantom.mask.astype(np.uint8),
        "chi": phantom.chi_ppm,
        "magnitude": magnitude,
        "noise": np.full(GRID.shape, 0.0025, dtype=np.float32),
    }
    for name, volume in volumes.items():
        nib.Nifti1Image(volume, affine).to_filename(folder / f"{name}.nii.gz")
    return {name: str(folder / f"{name}.nii.gz") for name in volumes}


@pytest.fixture
def run(files, tmp_path, capsys):
    """Run qsm-run on the head and return its exit code, report and messages."""

    def run(*arguments, b0=True):
        out, report = tmp_path / "out.nii.gz", tmp_path / "report.json"
        direction = ["--b0-direction", *map(str, GRID.b0_direction)] if b0 else []
        where = ["-m", files["mask"], "-o", str(out), "--report", str(report), "--force"]
        code = main([files["field"], *where, *direction, *arguments])
        err = capsys.readouterr().err
        return code, json.loads(report.read_text()) if code == 0 else {}, err

    return run


class TestMaps:
    def test_without_a_name_it_is_tv(self, run, files):
        code, report, err = run("--truth", files["chi"])
        assert code == 0
        assert err.splitlines()[-1]
        first = next(line for line in err.splitlines() if not line.startswith("note"))
        assert first.startswith("tv (total variation")
        assert "default" in first
        found = report["inversion"]
        assert found["iterations"] == 30
        assert found["alpha_ppm_mm"] == pytest.approx(
            found["sigma_ppm"] * np.prod(GRID.voxel_size_mm) ** (1 / 3) / 23
        )
        assert 0.002 < found["sigma_ppm"] < 0.004
        assert found["fitted_residual"] < report["field_residual"]
        assert report["metrics"]["nrmse_percent"] < 45

    @pytest.mark.parametrize("name", ["tv", "tkd", "tikhonov", "medi", "ilsqr"])
    def test_files_and_arrays_give_the_same(self, run, files, head, tmp_path, name):
        phantom, magnitude = head
        said = {"iterations": 4} if "iterations" in METHODS[name].options else {}
        flags = [f"--{key}={value}" for key, value in said.items()]
        if name == "medi":
            flags += ["--magnitude", files["magnitude"]]
        assert run("--method", name, *flags)[0] == 0
        written = nib.load(tmp_path / "out.nii.gz").get_fdata(dtype=np.float32)
        more = {"magnitude": magnitude} if name == "medi" else {}
        chi = qsm.reconstruct(
            phantom.local_field_ppm, phantom.mask, method=name, **PLACE, **more, **said
        )
        # a header holds voxel sizes in single precision
        assert np.abs(chi - written).max() < 1e-4 * np.abs(chi).max()
        assert not chi[~phantom.mask].any()

    def test_tkd_is_the_kernel(self, head):
        phantom, _ = head
        chi = qsm.reconstruct(
            phantom.local_field_ppm, phantom.mask, method="tkd", threshold=0.15, **PLACE
        )
        field = phantom.local_field_ppm * phantom.mask
        expected = tkd(field, GRID, threshold=0.15, pad_voxels=8) * phantom.mask
        assert np.array_equal(chi, expected)

    def test_a_noise_map_wins_over_the_estimate(self, run, files):
        _, report, _ = run("--noise-map", files["noise"], "--iterations", "3")
        assert report["inversion"]["sigma_ppm"] == pytest.approx(0.0025)
        assert report["inversion"]["sigma_from"] == "noise map"

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"noise_ppm": 0.0003}, None),
            ({"noise_ppm": 0.00005}, "is the map in ppm"),
            ({"alpha": 5e-4}, None),
            ({"alpha": 1000.0}, "the noise of the field asks for 0.0001"),
        ],
        ids=str,
    )
    def test_what_the_field_contradicts_is_told(self, head, said, message):
        phantom, _ = head
        said = {k: np.full(GRID.shape, v) if k == "noise_ppm" else v for k, v in said.items()}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            qsm.reconstruct(phantom.local_field_ppm, phantom.mask, iterations=2, **PLACE, **said)
        assert [message in str(w.message) for w in told] == [True] * (message is not None)

    @pytest.mark.parametrize("hz_per_ppm", [128.0, 16.0])
    def test_more_noise_than_field_is_refused(self, head, hz_per_ppm):
        phantom, _ = head
        noise = np.full(GRID.shape, 0.0025 * hz_per_ppm)
        with pytest.raises(DataError, match=r"noise map's median is .* the noise .* in ppm"):
            qsm.reconstruct(phantom.local_field_ppm, phantom.mask, noise_ppm=noise, **PLACE)

    def test_a_noise_map_is_its_median_and_blind_to_single_voxels(self, head):
        phantom, _ = head
        noise = np.full(GRID.shape, 0.0025)
        field, mask = phantom.local_field_ppm, phantom.mask
        chi = qsm.reconstruct(field, mask, noise_ppm=noise, iterations=5, **PLACE)
        for wrong in (1e-30, 1e30):
            noise[22, 25, 20] = wrong
            other = qsm.reconstruct(field, mask, noise_ppm=noise, iterations=5, **PLACE)
            assert nrmse(other, chi, mask) < 1

    @pytest.mark.parametrize("wrong", [np.ones(GRID.shape, complex), np.full(GRID.shape, "a")])
    def test_a_magnitude_is_real(self, head, wrong):
        phantom, _ = head
        with pytest.raises(DataError, match=r"magnitude is of type .* expected real numbers"):
            qsm.reconstruct(phantom.local_field_ppm, phantom.mask, magnitude=wrong, **PLACE)

    def test_a_stated_alpha_is_taken(self, run):
        _, report, _ = run("--method", "tv", "--alpha", "0.0003", "--iterations", "3")
        assert report["inversion"]["alpha_ppm_mm"] == 0.0003
        assert report["model"]["said"] == {"alpha": 0.0003, "iterations": 3}

    def test_robust_drops_what_no_map_explains(self, head):
        phantom, _ = head
        field = phantom.local_field_ppm.copy()
        wrong = np.flatnonzero(phantom.mask)[::200]
        field.reshape(-1)[wrong] += 0.39
        how = {"mask": phantom.mask, **PLACE}
        with pytest.warns(UserWarning, match="try --robust"):
            plain = qsm.reconstruct(field, **how)
        with pytest.warns(UserWarning, match="were dropped"):
            robust = qsm.reconstruct(field, robust=True, **how)
        errors = [nrmse(chi, phantom.chi_ppm, phantom.mask) for chi in (plain, robust)]
        assert errors[1] < 0.4 * errors[0]

    def test_a_field_tells_that_b0_lay_along_another_axis(self, head):
        phantom, _ = head
        along_x = replace(GRID, b0_direction=(1.0, 0.0, 0.0))
        rng = np.random.default_rng(0)
        field = local_field(phantom.chi_ppm, phantom.mask, along_x, noise_ppm=0.0025, rng=rng)
        with pytest.warns(UserWarning, match=r"B0 lay along \(1, 0, 0\), not along \(0.09988"):
            qsm.reconstruct(field, phantom.mask, method="tkd", **PLACE)

    @pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]], ids=str)
    def test_cosmos_of_three_orientations(self, head, order):
        phantom, _ = head
        rng = np.random.default_rng(0)
        grids = tilted(GRID, 3, 25)
        fields = np.stack(
            [
                local_field(phantom.chi_ppm, phantom.mask, g, noise_ppm=0.0025, rng=rng)
                for g in grids
            ]
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            chi = qsm.reconstruct(
                fields,
                phantom.mask,
                method="cosmos",
                voxel_size_mm=GRID.voxel_size_mm,
                b0_direction=[grids[n].b0_direction for n in order],
            )
        mistaken = order != [0, 1, 2]
        assert (nrmse(chi, phantom.chi_ppm, phantom.mask) < 25) is not mistaken
        said = [str(w.message).startswith(f"field {n + 2} looks as if") for n, w in enumerate(told)]
        assert said == [True, True] * mistaken

    def test_cosmos_says_where_orientations_are_too_alike(self, head):
        phantom, _ = head
        grids = tilted(GRID, 2, 8)
        rng = np.random.default_rng(0)
        turned = local_field(phantom.chi_ppm, phantom.mask, grids[1], noise_ppm=0.0025, rng=rng)
        with pytest.warns(UserWarning, match="turn the head farther"):
            qsm.reconstruct(
                np.stack([phantom.local_field_ppm, turned]),
                phantom.mask,
                method="cosmos",
                iterations=1,
                voxel_size_mm=GRID.voxel_size_mm,
                b0_direction=[g.b0_direction for g in grids],
            )

    def test_the_bundled_network_by_name(self):
        model = qsm.open_model(method="tv-unet")
        assert model.card.network == "tv-unet"
        with pytest.raises(UsageError, match="is no network"):
            _ = qsm.open_model(method="tv").card


class TestRefusals:
    @pytest.mark.parametrize(
        "said",
        [{"alpha": "auto"}, {"iterations": 1.5}, {"iterations": True}, {"robust": "no"}],
        ids=str,
    )
    def test_of_what_is_no_number(self, said):
        with pytest.raises(UsageError, match=r"must be .*, got (.auto.|1\.5|True|.no.)"):
            Method("tv", **said)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("--method tkd --alpha 1e-4", "--alpha is for tv and medi; tkd takes --threshold"),
            ("--method tkd --robust", "--robust is for tv and medi"),
            ("--method ilsqr --lam 1", "--lam is for tikhonov; ilsqr takes --iterations"),
            ("--method tikhonov --magnitude MAGNITUDE", "--magnitude is for tv and medi"),
            ("--method medi", "pass --magnitude FILE, or --method tv"),
            ("--method cosmos", "one for each orientation"),
            ("--method tv --data-consistency auto", "--data-consistency: tv explains"),
            ("--patch 32", "--patch, --overlap and --blend: tv needs it whole"),
            ("--allow-geometry", "takes any geometry"),
            ("--backend onnxruntime", "--backend onnxruntime: tv computes"),
            ("--precision bf16", "--precision bf16: tv computes"),
            ("--method tv-unet --alpha 1e-4", "--alpha is for methods"),
            ("--method tv-unet --magnitude MAGNITUDE", "tv-unet takes none"),
            ("--method tkd --threshold 0.9", "--threshold must be 0.001 to 0.6667, got 0.9"),
            ("--method tkd --threshold -0.1", "--threshold must be 0.001 to 0.6667"),
            ("--method tkd --threshold 1e-300", "--threshold must be 0.001 to 0.6667"),
            ("--alpha 1e30", "--alpha must be 1e-09 to 1000 ppm mm, got 1e+30"),
            ("--robust --alpha 1e38", "--alpha must be 1e-09 to 1000 ppm mm"),
            ("--method tikhonov --lam 1e300", "--lam must be 1e-09 to 1000, got 1e+300"),
            ("--method tikhonov --lam 1e-300", "--lam must be 1e-09 to 1000"),
            ("--iterations 99999999999999999999", "--iterations must be 1 to 10000"),
            ("--magnitude MASKED", "0 everywhere inside the mask"),
        ],
    )
    def test_say_why(self, run, files, tmp_path, arguments, said):
        empty = tmp_path / "empty.nii.gz"
        nib.Nifti1Image(
            np.zeros(GRID.shape, np.float32), np.diag([*GRID.voxel_size_mm, 1])
        ).to_filename(empty)
        names = {"MAGNITUDE": files["magnitude"], "MASKED": str(empty)}
        code, _, err = run(*(names.get(word, word) for word in arguments.split()))
        assert said in err
        assert code in (2, 3)

    def test_a_model_and_a_method(self, files, capsys, card, write_model):
        assert main([str(write_model(card)), files["field"], "--method", "tv"]) == 2
        assert "drop one" in capsys.readouterr().err

    def test_a_magnitude_on_another_grid(self, run, tmp_path):
        other = tmp_path / "other.nii.gz"
        nib.Nifti1Image(np.ones((9, 9, 9), np.float32), np.eye(4)).to_filename(other)
        code, _, err = run("--magnitude", str(other))
        assert code == GeometryError.exit_code
        assert "other.nii.gz" in err

    def test_memory(self, head):
        phantom, _ = head
        with pytest.raises(MemoryLimitError, match=r"tv would need .* the limit is 1 MiB"):
            qsm.reconstruct(phantom.local_field_ppm, phantom.mask, memory_limit=2**20, **PLACE)

    def test_names(self):
        with pytest.raises(UsageError, match="no method 'fansi'; there are tv, tkd"):
            Method("fansi")
        assert set(METHODS) == set(RUNNERS)


def test_dry_run_says_what_would_be_done(files, capsys):
    line = [files["field"], "-m", files["mask"], "--dry-run", "-o", files["field"] + "x.nii.gz"]
    assert main([*line, "--method", "tv", "--alpha", "1e-4"]) == 0
    out = capsys.readouterr().out
    assert "tv (total variation, by ADMM), alpha 0.0001" in out
    assert "a method takes the whole volume" in out


def test_threads_are_those_that_were_asked_for(head, monkeypatch):
    phantom, _ = head
    seen = []

    def counted(count):
        seen.append(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(grid, "ThreadPoolExecutor", counted)
    maps = []
    for threads, expected in ((1, 1), (0, workers()), (2, 2)):
        model = qsm.open_model(method="tv", iterations=2, threads=threads)
        maps.append(model.reconstruct(phantom.local_field_ppm, phantom.mask, **PLACE))
        assert set(seen) == {expected}
        seen.clear()
    assert np.array_equal(maps[0], maps[1])
    assert model.reconstructor.inversion.facts()["backend"]["threads"] == 2


def test_progress_counts_iterations(head):
    phantom, _ = head
    for said, expected in (
        ({"method": "tv", "iterations": 5}, 5),
        ({"method": "tv", "iterations": 5, "robust": True}, 25),
        ({"method": "tkd"}, 1),
        ({"method": "ilsqr", "iterations": 3}, 6),
    ):
        seen = []
        qsm.open_model(**said).reconstruct(
            phantom.local_field_ppm,
            phantom.mask,
            **PLACE,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == [(n + 1, expected) for n in range(expected)]


def test_a_scan_is_cut_with_its_magnitude(head):
    from qsm_deploy.runtime.scan.arrays import scan_from_arrays

    phantom, magnitude = head
    scan = scan_from_arrays(phantom.local_field_ppm, phantom.mask, magnitude=magnitude, **PLACE)
    box = (slice(5, 30), slice(4, 40), slice(6, 33))
    assert np.array_equal(scan.cut(box).magnitude, (magnitude * phantom.mask)[box])
    assert scan.nbytes == replace(scan, magnitude=None).nbytes + magnitude.nbytes
