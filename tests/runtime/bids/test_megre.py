"""Multi-echo phase and magnitude in a BIDS dataset become maps, and nothing is guessed."""

import json
import math

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.job import memory_limit
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.scan.units import GYROMAGNETIC_MHZ_PER_T

SHAPE = (40, 36, 32)
TIMES_S = (0.004, 0.01, 0.016)
HERTZ_PER_PPM = GYROMAGNETIC_MHZ_PER_T * 3
ANAT = "sub-01/anat"
BRAIN = "derivatives/brain"
MASK_FILE = f"{BRAIN}/{ANAT}/sub-01_desc-brain_mask"
DESCRIPTION = {"Name": "Spheres", "BIDSVersion": "1.10.0"}


def distance_from(centre):
    return np.sqrt(sum((n - c) ** 2 for n, c in zip(np.indices(SHAPE), centre, strict=True)))


MASK = distance_from((20, 18, 16)) < 13


@pytest.fixture(scope="module")
def local_field():
    """Return the field of two spheres in the mask [ppm]."""
    chi = 0.3 * (distance_from((17, 18, 16)) < 3) - 0.2 * (distance_from((25, 20, 14)) < 2.5)
    return (MASK * dipole_convolve(chi.astype(np.float32), Geometry(SHAPE))).astype(np.float32)


@pytest.fixture(scope="module")
def phases(local_field):
    """Return the wrapped phase of every echo [rad]: with a background, and one at excitation."""
    x, y, z = (axis / 16 - 1 for axis in np.indices(SHAPE))
    total = local_field + 0.3 * x + 0.2 * (x * x - y * y) + 0.1 * x * z
    turns = [HERTZ_PER_PPM * total * time for time in TIMES_S]
    rng = np.random.default_rng(1)
    outside = rng.uniform(-math.pi, math.pi, SHAPE)
    wrapped = [np.angle(np.exp(1j * (2 * math.pi * turn + 0.5 + 0.2 * y))) for turn in turns]
    return [np.where(MASK, phase, outside).astype(np.float32) for phase in wrapped]


@pytest.fixture
def dataset(tmp_path, phases):
    """Return a dataset of one subject, its field strength stated once for all."""
    root = tmp_path / "study"
    write(root, "dataset_description.json", DESCRIPTION)
    write(root, "MEGRE.json", {"MagneticFieldStrength": 3})
    (root / "README.md").write_text("Two spheres in a larger one.\n" * 10)
    made = {"DatasetType": "derivative", "GeneratedBy": [{"Name": "tests"}]}
    write(root, f"{BRAIN}/dataset_description.json", made | DESCRIPTION)
    write(root, f"{MASK_FILE}.nii.gz", MASK.astype(np.uint8))
    write(root, f"{MASK_FILE}.json", {"Type": "Brain"})
    for echo, (phase, time) in enumerate(zip(phases, TIMES_S, strict=True), 1):
        stem = f"{ANAT}/sub-01_echo-{echo}_part"
        write(root, f"{stem}-phase_MEGRE.nii.gz", phase)
        write(root, f"{stem}-phase_MEGRE.json", {"EchoTime": time, "Units": "rad"})
        signal = MASK * np.float32(100 * math.exp(-time / 0.03))
        write(root, f"{stem}-mag_MEGRE.nii.gz", signal.astype(np.float32))
        write(root, f"{stem}-mag_MEGRE.json", {"EchoTime": time})
    return root


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".json"):
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(nifti_bytes(content, np.eye(4)))


@pytest.fixture
def run(card, write_model, dataset, capsys):
    """Return a function that runs a model, twice the field, on the dataset."""
    model = write_model(card)

    def run_on(*flags):
        code = main([str(model), "--bids", str(dataset), *flags])
        return code, *capsys.readouterr()

    return run_on


@pytest.fixture
def chi(dataset):
    """Return a function that reads the map."""
    path = dataset / "derivatives/qsm-deploy" / ANAT / "sub-01_Chimap.nii.gz"
    return lambda: nib.load(path).get_fdata()


def test_the_local_field_is_what_the_network_gets(run, chi, local_field):
    code, _, err = run()
    assert code == 0, err
    assert "sub-01: 3 echoes, phase in radians from -pi to pi" in err
    found = chi()
    assert not found[~MASK].any()
    inner = distance_from((20, 18, 16)) < 10
    expected = 2 * local_field[inner]
    error = found[inner] - expected
    error -= error.mean()  # phase does not tell a constant
    # 0.202; the spheres are stronger than what is expected of tissue
    assert np.linalg.norm(error) < 0.25 * np.linalg.norm(expected - expected.mean())


def test_a_mask_in_another_order_is_taken_and_one_of_another_grid_is_named(run, chi, dataset):
    assert (told := run())[0] == 0, told
    expected = chi()
    (path,) = (dataset / BRAIN).rglob("*_mask.nii*")
    mask = nib.load(path)
    letters = nib.orientations.axcodes2ornt("LPS")
    turned = mask.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(mask.affine), letters)
    )
    path.unlink()
    turned.to_filename(path)
    assert run("--force")[0] == 0
    np.testing.assert_array_equal(chi(), expected)
    moved = mask.affine.copy()
    moved[0, 3] += 3
    inside = np.asarray(turned.dataobj)
    path.unlink()
    nib.Nifti1Image(inside, moved).to_filename(path)
    code, _, err = run("--force")
    assert code == 0, err
    assert f"{path.name} lies on another grid than sub-01" in err


def test_the_validator_accepts_it(run, dataset, validate):
    assert (told := run())[0] == 0, told
    for folder in (dataset, dataset / BRAIN, dataset / "derivatives/qsm-deploy"):
        assert validate(folder) == []


def test_integers_give_the_same_map_as_radians(run, chi, dataset, phases):
    assert (told := run())[0] == 0, told
    radians = chi()
    for echo, phase in enumerate(phases, 1):
        stem = f"{ANAT}/sub-01_echo-{echo}_part-phase_MEGRE"
        steps = np.clip(np.rint(phase * 2048 / math.pi), -2048, 2047).astype(np.int16)
        write(dataset, f"{stem}.nii.gz", steps)
        write(dataset, f"{stem}.json", {"EchoTime": TIMES_S[echo - 1], "Units": "arbitrary"})
    code, _, err = run("--force")
    assert code == 0, err
    assert "phase in -2048 to 2047, 4096 per turn" in err
    # half a step of the phase, through the first pair of echoes
    np.testing.assert_allclose(chi(), radians, atol=0.01)


def put_parts(dataset, phases, kind=np.float32, offset=0):
    """Write real and imaginary parts of all echoes."""
    for echo, (phase, time) in enumerate(zip(phases, TIMES_S, strict=True), 1):
        signal = MASK * 1000 * math.exp(-time / 0.03)
        for part, wave in (("real", np.cos), ("imag", np.sin)):
            stem = f"{ANAT}/sub-01_echo-{echo}_part-{part}_MEGRE"
            write(dataset, f"{stem}.nii.gz", (signal * wave(phase) + offset).astype(kind))
            write(dataset, f"{stem}.json", {"EchoTime": time})


def remove(dataset, *parts):
    for part in parts:
        for path in (dataset / ANAT).glob(f"*_part-{part}_*"):
            path.unlink()


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_real_and_imaginary_parts_give_the_same_map(run, chi, dataset, phases, kind):
    assert (told := run())[0] == 0, told
    polar = chi()
    put_parts(dataset, phases, kind)
    code, _, err = run("--force")
    assert code == 0, err
    assert "taking phase and magnitude, not the real and imaginary parts (sub-01_echo-" in err
    np.testing.assert_array_equal(chi(), polar)
    remove(dataset, "phase", "mag")
    code, _, err = run("--force")
    assert code == 0, err
    assert "3 echoes, phase in radians, of real and imaginary parts" in err
    # background removal magnifies what float32 rounds
    np.testing.assert_allclose(chi(), polar, atol=5e-4 if kind is np.float32 else 0.01)
    sidecar = dataset / "derivatives/qsm-deploy" / ANAT / "sub-01_Chimap.json"
    assert sum("part-imag" in uri for uri in json.loads(sidecar.read_text())["Sources"]) == 3


IMAGINARY = f"{ANAT}/sub-01_echo-2_part-imag_MEGRE"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (f"{IMAGINARY}.nii.gz", np.full(SHAPE, np.inf, "f4"), "the part-imag has NaN or Inf"),
        (f"{IMAGINARY}.nii.gz", np.zeros((40, 36, 31), "f4"), "has shape (40, 36, 31)"),
        (f"{IMAGINARY}.json", {"EchoTime": 0.02}, "EchoTime is 0.02, that of its"),
        (f"{ANAT}/sub-01_echo-2_part-real_MEGRE.json", {}, "EchoTime is not stated"),
    ],
)
def test_wrong_parts_are_named(run, dataset, phases, name, content, says):
    remove(dataset, "phase", "mag")
    put_parts(dataset, phases)
    write(dataset, name, content)
    code, _, err = run()
    assert code == 3
    [line] = [line for line in err.splitlines() if line.startswith("qsm-run: error: sub-01: ")]
    assert says in line


def test_parts_that_are_stored_around_another_value_than_0(run, dataset, phases):
    remove(dataset, "phase", "mag")
    put_parts(dataset, phases, np.int16, offset=2048)
    code, _, err = run()
    assert code == 3
    assert "are nowhere negative" in err


def test_echoes_in_one_file_give_the_same_map(run, chi, dataset, phases):
    assert run()[0] == 0
    expected = chi()
    signals = [MASK * np.float32(100 * math.exp(-time / 0.03)) for time in TIMES_S]
    remove(dataset, "phase", "mag")
    for part, volumes in (("phase", phases), ("mag", signals)):
        stem = f"{ANAT}/sub-01_part-{part}_MEGRE"
        write(dataset, f"{stem}.nii.gz", np.stack(volumes, axis=-1))
        write(dataset, f"{stem}.json", {"EchoTime": list(TIMES_S)})
    code, _, err = run("--force")
    assert code == 0, err
    np.testing.assert_array_equal(chi(), expected)
    write(dataset, f"{ANAT}/sub-01_part-phase_MEGRE.json", {"EchoTime": 0.004})
    code, _, err = run("--force")
    assert code == 3
    assert "EchoTime is 0.004, 0.01, 0.016, that of its phase sub-01_part-phase_MEGRE" in err
    write(dataset, f"{ANAT}/sub-01_part-mag_MEGRE.json", {})
    code, _, err = run("--force")
    assert code == 3
    assert "3 echoes of phase, 1 echo times (4 ms); one for each is needed" in err


def test_negate_turns_the_map(run, chi):
    assert (told := run())[0] == 0, told
    upright = chi()
    assert run("--negate", "--force")[0] == 0
    np.testing.assert_allclose(chi(), -upright, atol=1e-4)


def test_without_a_mask_the_signal_is_taken(run, chi, dataset):
    (dataset / f"{MASK_FILE}.nii.gz").unlink()
    code, _, err = run("--erode", "0")
    assert code == 0, err
    assert "THIS IS NO BRAIN MASK" in err
    assert np.count_nonzero((chi() != 0) ^ MASK) < 0.1 * MASK.sum()


def test_the_direction_in_the_sidecar_counts(run, dataset):
    write(dataset, "MEGRE.json", {"MagneticFieldStrength": 3, "B0_dir": [0, 0.6, 0.8]})
    assert (told := run())[0] == 0, told
    sidecar = dataset / "derivatives/qsm-deploy" / ANAT / "sub-01_Chimap.json"
    content = json.loads(sidecar.read_text())
    assert content["geometry"]["b0_direction"] == pytest.approx([0, 0.6, 0.8])
    assert len(content["Sources"]) == 7


PHASE, MAGNITUDE = f"{ANAT}/sub-01_echo-2_part-phase_MEGRE", f"{ANAT}/sub-01_echo-2_part-mag_MEGRE"
RAD = {"EchoTime": 0.01, "Units": "rad"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("MEGRE.json", {}, "MagneticFieldStrength is not stated there nor in a file"),
        (f"{PHASE}.json", {"Units": "rad"}, "EchoTime is not stated there nor in a file"),
        (f"{PHASE}.json", RAD | {"EchoTime": 10}, "EchoTime is 0.01, that of its phase"),
        (f"{PHASE}.json", RAD | {"MagneticFieldStrength": 7}, "is 3 in one echo and 7 in another"),
        (f"{MAGNITUDE}.json", {"EchoTime": 0.02}, "EchoTime is 0.02, that of its phase"),
        (f"{PHASE}.nii.gz", np.full(SHAPE, np.nan, "f4"), "voxels of the phase are NaN or Inf"),
        (f"{PHASE}.nii.gz", np.full(SHAPE, 9, "f4"), "which is no wrapped phase in rad"),
        (f"{PHASE}.nii.gz", np.zeros((40, 36, 31), "f4"), "has shape (40, 36, 31)"),
        (f"{MAGNITUDE}.nii.gz", np.full(SHAPE, -1, "f4"), "the magnitude has negative values"),
        (f"{MAGNITUDE}.nii.gz", np.zeros((40, 36, 31), "f4"), "has shape (40, 36, 31)"),
        (f"{MASK_FILE}.nii.gz", np.zeros(SHAPE, np.uint8), "the mask is empty"),
    ],
)
def test_what_is_missing_or_wrong_is_named(run, dataset, name, content, says):
    write(dataset, name, content)
    code, out, err = run()
    assert (code, out) == (3, "")
    [line] = [line for line in err.splitlines() if line.startswith("qsm-run: error: sub-01: ")]
    assert says in line


@pytest.mark.parametrize(
    ("limit", "says"), [("2M", "3 echoes would take"), ("2500K", "field mapping would take")]
)
def test_memory_is_asked_for_before_it_is_taken(run, dataset, limit, says, monkeypatch):
    monkeypatch.setattr(memory_limit, "rss_bytes", lambda: 0)  # of a program that took none
    monkeypatch.setattr(memory_limit, "LIBRARIES_BYTES", 0)
    write(dataset, f"{MASK_FILE}.nii.gz", np.ones(SHAPE, np.uint8))
    code, _, err = run("--memory-limit", limit)
    assert code == 6
    assert says in err


def test_echo_times_in_milliseconds(run, dataset):
    for echo, time in enumerate((4, 10, 16), 1):
        for part in ("phase", "mag"):
            name = f"{ANAT}/sub-01_echo-{echo}_part-{part}_MEGRE.json"
            write(dataset, name, {"EchoTime": time, "Units": "rad"})
    code, _, err = run()
    assert code == 3
    assert "an echo time of 4 s cannot be right" in err


def test_units_that_the_phase_is_not_in(run, dataset):
    first = {"EchoTime": TIMES_S[0], "Units": "Hz"}
    write(dataset, f"{ANAT}/sub-01_echo-1_part-phase_MEGRE.json", first)
    code, _, err = run()
    assert code == 3
    assert "Units are 'Hz', the phase reaches from" in err


@pytest.mark.parametrize("flags", [("--units", "rad"), ("--field-strength", "3")])
def test_flags_for_local_fields(run, flags):
    code, _, err = run(*flags)
    assert code == 2
    assert "are for local fields; the sidecars of a MEGRE state both" in err


def test_a_real_recording_and_its_stale_slope(run, dataset, shared, chi):
    data = shared / "data/gre_crop"
    phase, magnitude = nib.load(data / "Phase.nii"), nib.load(data / "Mag.nii")
    (dataset / f"{MASK_FILE}.nii.gz").unlink()

    def put(values, part):
        for echo in range(3):
            path = dataset / ANAT / f"sub-01_echo-{echo + 1}_part-{part}_MEGRE.nii.gz"
            volume = np.asarray(values[..., echo], dtype=np.float32)
            path.write_bytes(nifti_bytes(volume, phase.affine))

    put(magnitude.dataobj, "mag")
    put(phase.dataobj, "phase")  # as its header scales it
    code, _, err = run()
    assert code == 3
    assert "is the scaling (scl_slope) in the header stale?" in err
    put(phase.dataobj.get_unscaled(), "phase")
    assert (told := run())[0] == 0, told
    assert 0.02 < np.percentile(np.abs(chi()), 99) < 1


class TestMethods:
    """Without a network: total variation, and MEDI, whose edges are those of the magnitude."""

    @pytest.fixture
    def run(self, dataset, capsys):
        def run_on(*flags):
            return main(["--bids", str(dataset), *flags]), capsys.readouterr().err

        return run_on

    @pytest.fixture
    def sidecar(self, dataset):
        path = dataset / "derivatives/qsm-deploy" / ANAT / "sub-01_Chimap.json"
        return lambda: json.loads(path.read_text())

    def test_resume_does_not_mix_steps_to_the_field(self, run) -> None:
        words = ("--method", "tkd", "--background-removal", "pdf")
        assert run(*words)[0] == 0
        assert run(*words, "--resume")[0] == 0
        for others in ((), ("--background-removal", "pdf", "--erode", "8")):
            code, err = run("--method", "tkd", *others, "--resume")
            assert (code, "steps to the local field" in err) == (2, True)

    def test_total_variation_is_the_default(self, run, chi, sidecar, dataset, validate):
        assert (told := run())[0] == 0, told
        content = sidecar()
        assert content["model"]["method"] == "tv"
        assert content["inversion"]["sigma_ppm"] > 0
        assert not [source for source in content["Sources"] if "localfield" in source]
        assert chi()[17, 18, 16] > 0.1 > -0.05 > chi()[25, 20, 14]
        assert validate(dataset / "derivatives/qsm-deploy") == []

    def test_medi_takes_the_magnitude_of_the_echoes(self, run, chi, sidecar, dataset, validate):
        code, err = run("--method", "medi")
        assert (code, "the magnitude is the same everywhere" in err) == (3, True)
        x = np.indices(SHAPE)[0]
        for echo in (1, 2, 3):  # an edge that the field does not have
            signal = MASK * np.where(x < 20, 100, 80).astype(np.float32) + (x % 2)
            write(dataset, f"{ANAT}/sub-01_echo-{echo}_part-mag_MEGRE.nii.gz", MASK * signal)
        assert run("--method", "medi")[0] == 0
        medi, content = chi(), sidecar()
        assert content["model"]["method"] == "medi"
        assert sum("part-mag" in source for source in content["Sources"]) == 3
        assert validate(dataset / "derivatives/qsm-deploy") == []
        assert run("--method", "tv", "--force")[0] == 0
        assert np.abs(medi - chi()).max() > 1e-3

    def test_beside_a_local_field(self, run, sidecar, dataset, local_field):
        """The magnitudes of the recording's raw data; the field has none of its own."""
        x, y, _ = np.indices(SHAPE)
        for echo in (1, 2, 3):
            signal = MASK * (100 + x + 2 * (y % 3)).astype(np.float32) / echo
            write(dataset, f"{ANAT}/sub-01_echo-{echo}_part-mag_MEGRE.nii.gz", signal)
        write(dataset, f"{BRAIN}/{ANAT}/sub-01_localfield.nii.gz", local_field)
        write(dataset, f"{BRAIN}/{ANAT}/sub-01_localfield.json", {"Units": "ppm"})
        assert run("--method", "medi")[0] == 0
        content = sidecar()
        names = [f"sub-01_echo-{echo}_part-mag_MEGRE.nii.gz" for echo in (1, 2, 3)]
        assert content["input"]["magnitude"] == names
        assert content["Sources"][1:4] == [f"bids:source:{ANAT}/{name}" for name in names]
        assert run("--force")[0] == 0
        assert sidecar()["input"]["magnitude"] == []
        for name in names:
            (dataset / ANAT / name).unlink()
        code, err = run("--method", "medi", "--force")
        assert code == 3
        assert (
            "sub-01 has none (part-mag) beside its local field; add it, or pass --method tv" in err
        )
