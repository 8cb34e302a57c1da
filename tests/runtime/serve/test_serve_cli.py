"""qsm-serve in its own process, the example client in another, qsm-run to compare with."""

import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from ismrmrd.serialization import ConfigFile, ProtocolDeserializer
from scipy.spatial.transform import Rotation

import qsm_deploy.runtime as qsm
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.cli import main as qsm_run
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.serve.cli import main, parser

CLIENT = Path(__file__).parents[3] / "examples" / "mrd_client.py"
SHAPE, VOXEL = (36, 40, 30), (4.0, 4.2, 4.5)
TILT = Rotation.from_euler("xyz", (12, -20, 7), degrees=True).as_matrix()
# columns are the RAS directions of the voxel axes
AXES = {
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0]]),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
}
HALF_A_CODE_PPB = 0.5
GEOMETRY_PPB = 0.001  # what a geometry in single precision, in the headers, does to the map
BOUND_PPB = 2047


@pytest.fixture(scope="module")
def port(server_process):
    with server_process() as (process, number, _):
        yield number
        process.send_signal(signal.SIGTERM)


def affine_of(axes):
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(VOXEL)
    affine[:3, 3] = affine[:3, :3] @ -(np.array(SHAPE) / 2) + [5, -9, 13]
    return affine


def send(port, folder, *arguments):
    """Run the example client and return the map that it wrote, and its messages."""
    command = [sys.executable, CLIENT, *arguments, "--port", port, "-o", folder / "back"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return nib.load(done.stdout.strip()), done.stderr


def reference_ppm(folder, field, mask, *flags):
    """Return what qsm-run makes of the field [ppm]."""
    chi = folder / "chi.nii.gz"
    words = (field, "-m", mask, "-o", chi, "-q", "--force", *flags)
    assert qsm_run([str(word) for word in words]) == 0
    return nib.load(chi)


def require_same(returned, reference, texts):
    """Compare a map in ppb with one in ppm: geometry, values, and the bound."""
    np.testing.assert_allclose(returned.affine, reference.affine, atol=1e-4)
    ppm, ppb = reference.get_fdata(), returned.get_fdata()
    inside = np.abs(1000 * ppm) <= BOUND_PPB
    error = np.abs(ppb - 1000 * ppm)[inside].max()
    assert error <= HALF_A_CODE_PPB + GEOMETRY_PPB
    beyond = np.abs(np.rint(1000 * ppm)) > BOUND_PPB
    assert (np.abs(ppb[beyond]) == BOUND_PPB).all()
    assert beyond.any()  # the phantom's calcification
    assert f"WRN {np.count_nonzero(beyond)} voxels lie beyond 2.047 ppm" in texts


@pytest.mark.parametrize("swapped", [False, True], ids=["as it is", "phase direction swapped"])
@pytest.mark.parametrize("orientation", AXES)
def test_a_field_in_every_orientation(port, tmp_path, capfd, orientation, swapped):
    axes = TILT @ AXES[orientation]
    axes = axes * [1, -1, 1] if swapped else axes
    affine = affine_of(axes)
    head = head_phantom(Geometry.from_affine(SHAPE, affine), seed=2)
    field, mask = tmp_path / "field.nii.gz", tmp_path / "mask.nii.gz"
    chi = 2 * head.local_field_ppm  # a stronger calcification, for the bound
    field.write_bytes(nifti_bytes(chi, affine))
    mask.write_bytes(nifti_bytes(head.mask.astype(np.uint8), affine))
    arguments = ("dipole", field, "-m", mask, "--units", "ppm", "--field-strength", 3)
    returned, texts = send(port, tmp_path, *arguments)
    require_same(returned, reference_ppm(tmp_path, field, mask), texts)


def test_multi_echo_phase_and_magnitude(port, tmp_path):
    """The map of an oblique multi-echo phantom is that of its local field, made step by step."""
    affine = affine_of(TILT @ AXES["axial"])
    geometry = Geometry.from_affine(SHAPE, affine)
    head = head_phantom(geometry, seed=2)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    total = 2 * head.local_field_ppm + (0.3 * z + 0.2 * x * y).astype(np.float32)
    times, paths = (0.004, 0.009, 0.014), {"phase": [], "magnitude": []}
    phases, magnitudes = [], []
    rng = np.random.default_rng(6)
    for n, time_s in enumerate(times):
        turns = 42.577 * 3 * time_s * total
        noisy = turns + np.where(head.mask, 0.005, 9) * rng.standard_normal(SHAPE)
        stored = np.rint(4096 * (noisy - np.floor(noisy))).astype(np.uint16) % 4096
        magnitude = np.where(head.mask, 900 * math.exp(-time_s / 0.03), 20).astype(np.uint16)
        phases.append((stored - np.float32(2048)) * np.float32(2 * math.pi / 4096))
        magnitudes.append(magnitude.astype(np.float32))
        for kind, volume in (("phase", stored), ("magnitude", magnitude)):
            paths[kind].append(tmp_path / f"{kind}{n}.nii.gz")
            paths[kind][-1].write_bytes(nifti_bytes(volume, affine))
    mask = tmp_path / "mask.nii.gz"
    mask.write_bytes(nifti_bytes(head.mask.astype(np.uint8), affine))
    returned, texts = send(
        port, tmp_path, "qsm", "--phase", *paths["phase"], "--magnitude", *paths["magnitude"],
        "-m", mask, "--echo-times", *times, "--field-strength", 3,
    )  # fmt: skip
    assert "INFO phase in 0 to 4095, 4096 per turn" in texts

    local = qsm.local_field_from_echoes(
        np.stack(phases),
        np.stack(magnitudes),
        head.mask,
        echo_times_s=times,
        field_strength_t=3.0,
        voxel_size_mm=geometry.voxel_size_mm,
        b0_direction=geometry.b0_direction,
        axes=affine,
    )
    field = tmp_path / "local.nii.gz"
    field.write_bytes(nifti_bytes(local.field_ppm, affine))
    kept = tmp_path / "kept.nii.gz"
    kept.write_bytes(nifti_bytes(local.mask.astype(np.uint8), affine))
    noise = tmp_path / "noise.nii.gz"
    noise.write_bytes(nifti_bytes(local.found.noise_ppm, affine))
    reference = reference_ppm(tmp_path, field, kept, "--noise-map", noise)
    ppm, ppb = reference.get_fdata(), returned.get_fdata()
    np.testing.assert_allclose(returned.affine, reference.affine, atol=1e-4)
    inside = np.abs(1000 * ppm) <= BOUND_PPB
    assert np.abs(ppb - 1000 * ppm)[inside].max() <= HALF_A_CODE_PPB + GEOMETRY_PPB
    # and it shows what is in the head
    assert np.corrcoef(ppm[local.mask], head.chi_ppm[local.mask])[0, 1] > 0.7


def test_sigterm_lets_the_running_volume_finish(server_process, serialise, mrd_header, mrd_images):
    volume = np.random.default_rng(1).normal(0, 0.02, (72, 72, 72)).astype(np.float32)
    start = (ConfigFile("dipole"), mrd_header(), {"units": "ppm", "sendoriginal": "False"})
    stream = serialise(*start, *mrd_images(volume), None)
    with server_process() as (process, number, _):
        connection = socket.create_connection(("127.0.0.1", number), timeout=30)
        with connection, connection.makefile("rb") as answer:
            connection.sendall(stream)
            messages = ProtocolDeserializer(answer).deserialize()
            assert "72x72x72" in next(messages)  # it has begun
            process.send_signal(signal.SIGTERM)
            assert len([m for m in messages if not isinstance(m, str)]) == 72


def test_a_taken_port_is_a_usage_error(port, capsys):
    assert main(["--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_no_such_model(capsys, tmp_path):
    assert main([str(tmp_path / "no.onnx")]) == 3
    assert "no such model file" in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    missing = lambda name, *more: None if name == "ismrmrd" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert main([]) == 4
    assert "pip install '.[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "70000"],
        ["--idle-seconds", "0"],
        ["--max-clients", "0"],
        ["--allow", "scanner"],
        ["--allow", "10.0.0.1/8"],
    ],
)
def test_impossible_options(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words)
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "who"),
    [
        ((), None),
        (("--host", "0.0.0.0"), "anyone who reaches the port"),
        (("--host", "0.0.0.0", "--allow", "10.0.0.0/8", "--allow", "::1"), "10.0.0.0/8, ::1/128"),
    ],
)
def test_listening_to_other_machines_is_warned_of(server_process, flags, who):
    with server_process(*flags) as (process, _, log):
        process.send_signal(signal.SIGTERM)
    assert ("warning: 0.0.0.0 is not this machine alone" in log.text) == (who is not None)
    assert f"no encryption: {who} may use" in log.text or who is None


def test_help_is_quick():
    command = [sys.executable, "-X", "importtime", "-m", "qsm_deploy.runtime.serve.cli", "--help"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 2
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"numpy", "scipy", "ismrmrd", "openvino", "onnxruntime"}
