"""The repository in a real Triton, that of the wheel which ``QSM_TRITON_WHEEL`` names.

That Triton's Python backend needs ``numpy<2``, so that the environment that runs these tests is
one of its own, and serves the model too: `make test-triton`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import qsm_deploy.runtime as qsm
from benchmarks.triton_server import Server, inputs_of, started
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.triton.repository import write_repository
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

WHEEL = os.environ.get("QSM_TRITON_WHEEL")
if not WHEEL:
    pytest.skip("no Triton: QSM_TRITON_WHEEL names no wheel", allow_module_level=True)

import tritonclient.grpc  # noqa: E402 - installed where there is a Triton
import tritonclient.http  # noqa: E402
from tritonclient.utils import InferenceServerException, shared_memory  # noqa: E402

pytestmark = pytest.mark.slow

GRID = Geometry((40, 36, 33), (1.0, 0.86, 1.3), (0.0, 0.2, 0.98))
UNET, TV, QUEUED = "qsm_tv_unet", "qsm_tv", 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("triton")
    folder = place / "serve"
    write_repository(folder, Method("tv"), force=False)
    config = folder / "models" / TV / "config.pbtxt"
    config.write_text(config.read_text().replace("max_queue_size: 16", f"max_queue_size: {QUEUED}"))
    write_repository(folder, [BUNDLED_MODEL], force=True)
    with started(Path(str(WHEEL)), folder, place) as running:
        yield running


@pytest.fixture(scope="module")
def scan() -> dict[str, np.ndarray]:
    head = head_phantom(GRID, seed=3)
    return {
        "FIELD_PPM": head.local_field_ppm,
        "MASK": head.mask.astype(np.uint8),
        "VOXEL_SIZE_MM": np.array(GRID.voxel_size_mm),
        "B0_DIRECTION": np.array(GRID.b0_direction),
    }


@pytest.fixture(scope="module")
def expected(scan: dict[str, np.ndarray]) -> np.ndarray:
    said = {name.lower(): array for name, array in scan.items()}
    return np.asarray(qsm.reconstruct(**said, method="tv-unet", device="cpu"))


def probe(server: Server) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.http}"
    command = [sys.executable, str(server.folder / "probe.py"), "--url", url]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", [tritonclient.http, tritonclient.grpc])
def test_the_map_is_that_of_reconstruct_bit_for_bit(
    server: Server, scan: dict[str, np.ndarray], expected: np.ndarray, kind: Any
) -> None:
    with server.client(kind) as found:
        answer = found.infer(UNET, inputs_of(kind, scan))
    np.testing.assert_array_equal(answer.as_numpy("CHI_PPM"), expected)
    assert answer.as_numpy("NOTES").tolist() == [b""]


def test_shared_memory(
    server: Server, scan: dict[str, np.ndarray], expected: np.ndarray, tmp_path: Path
) -> None:
    kind, key, size = tritonclient.grpc, f"/{tmp_path.name}", expected.nbytes
    region = shared_memory.create_shared_memory_region("field", key, size)
    try:
        shared_memory.set_shared_memory_region(region, [scan["FIELD_PPM"]])
        inputs = inputs_of(kind, scan)
        inputs[0].set_shared_memory("field", size)
        with server.client(kind) as found:
            found.register_system_shared_memory("field", key, size)
            answer = found.infer(UNET, inputs)
            found.unregister_system_shared_memory("field")
    finally:
        shared_memory.destroy_shared_memory_region(region)
    np.testing.assert_array_equal(answer.as_numpy("CHI_PPM"), expected)


@pytest.mark.parametrize("kind", [tritonclient.http, tritonclient.grpc])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"MASK": np.ones((9, 9, 9), np.uint8)}, "the mask"),
        ({"B0_DIRECTION": np.zeros(3)}, "B0"),
        ({"FIELD_PPM": np.zeros(GRID.shape)}, "FP32"),
    ],
)
def test_what_cannot_be_right_is_the_callers_error(
    server: Server, scan: dict[str, np.ndarray], kind: Any, change: dict[str, Any], reason: str
) -> None:
    with server.client(kind) as found, pytest.raises(InferenceServerException) as error:
        found.infer(UNET, inputs_of(kind, scan | change))
    assert error.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert reason in str(error.value)


def test_the_lines_of_the_readme_give_what_qsm_run_gives(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    angle = np.deg2rad(12)
    turned = np.array(
        [[-1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    )
    affine = nib.affines.from_matvec(turned * GRID.voxel_size_mm, (10, -20, 5))
    head = head_phantom(Geometry.from_affine(GRID.shape, affine), seed=4)
    for name, volume in (("field", head.local_field_ppm), ("mask", head.mask.astype(np.uint8))):
        image = nib.Nifti1Image(volume, affine)
        image.set_sform(affine, code="scanner")
        nib.save(image, tmp_path / f"{name}.nii.gz")
    [lines] = re.findall(
        r"^```python\n(.*?)^```", (server.folder / "README.md").read_text(), flags=re.M | re.S
    )
    assert "127.0.0.1:8001" in lines
    monkeypatch.chdir(tmp_path)
    exec(lines.replace("127.0.0.1:8001", f"127.0.0.1:{server.grpc}"), {})
    made = qsm.run("field.nii.gz", mask="mask.nii.gz", method="tv-unet", device="cpu")
    served = nib.load("chi.nii.gz")
    np.testing.assert_array_equal(np.asarray(served.dataobj), made.chi_ppm)
    np.testing.assert_allclose(served.affine, affine, atol=1e-6)


def test_a_full_queue_refuses_at_once_and_the_rest_is_served(server: Server) -> None:
    head = head_phantom(Geometry((96, 96, 96)), seed=1)
    tensors = {
        "FIELD_PPM": head.local_field_ppm,
        "MASK": head.mask.astype(np.uint8),
        "VOXEL_SIZE_MM": np.ones(3),
        "B0_DIRECTION": np.array([0.0, 0, 1]),
    }

    def call(number: int) -> str:
        try:
            with server.client(tritonclient.grpc) as found:
                found.infer(TV, inputs_of(tritonclient.grpc, tensors))
        except InferenceServerException as error:
            return str(error)
        return "made"

    with ThreadPoolExecutor(6) as calls:
        answers = [*calls.map(call, range(6))]
    refused = [answer for answer in answers if answer != "made"]
    full = r"\[StatusCode.UNAVAILABLE\] .*maximum queue size"
    assert all(re.match(full, answer) for answer in refused)
    assert 2 <= len(answers) - len(refused) <= 4  # one runs, one waits, and what ends meanwhile


def test_own_counters_tell_maps_from_refusals(server: Server, scan: dict[str, np.ndarray]) -> None:
    kind = tritonclient.grpc

    def counted(outcome: str) -> float:
        text = server.get(f"{server.metrics}/metrics")
        _, _, rest = text.partition(f'qsm_scans_total{{model="{UNET}",outcome="{outcome}"}} ')
        return float(rest.split()[0]) if rest else 0

    before = [counted("made"), counted("refused")]
    assert probe(server).returncode == 0
    with server.client(kind) as found:
        for _ in range(2):
            with pytest.raises(InferenceServerException, match="B0"):
                found.infer(UNET, inputs_of(kind, scan | {"B0_DIRECTION": np.zeros(3)}))
    assert [counted("made") - before[0], counted("refused") - before[1]] == [1, 2]


def test_the_probe_finds_a_killed_process_though_triton_says_ready(server: Server) -> None:
    os.kill(server.stub(TV), signal.SIGKILL)
    time.sleep(1)
    probed = probe(server)
    assert probed.returncode == 1
    assert probed.stdout == f"{UNET}: ok\n"
    assert probed.stderr.startswith(f"{TV}: ")
    server.get(f"{server.http}/v2/models/{TV}/ready")
