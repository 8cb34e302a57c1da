"""The predicted peak memory of a run against the measured one, each in a process of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

TOLERANCE = 0.15
PROGRAM = "import sys; from qsm_deploy.runtime.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def command(write_volume, tmp_path):
    """Return a function that gives the run of a brain of random field in a grid."""

    def words(shape):
        mask = np.zeros(shape, dtype=np.uint8)
        mask[tuple(slice(n // 8, -n // 8) for n in shape)] = 1
        field = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32) * mask
        paths = {
            name: str(write_volume(volume, f"{name}.nii.gz"))
            for name, volume in {"field": field, "mask": mask, "truth": 2 * field}.items()
        }
        return [
            *(sys.executable, "-c", PROGRAM, paths["field"], "--mask", paths["mask"]),
            *("--truth", paths["truth"], "--report", str(tmp_path / "report.json"), "--force"),
        ]

    return words


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("shape", [(48, 48, 48), (96, 112, 96)], ids=["48", "96x112x96"])
def test_the_peak_of_a_small_volume_is_predicted(command, tmp_path, shape, backend):
    words = [*command(shape), "--backend", backend]
    for more in ([], ["--patch", "48", "--figure", str(tmp_path / "chi.png")]):
        subprocess.run([*words, *more], check=True, capture_output=True)
        memory = json.loads((tmp_path / "report.json").read_text())["memory"]
        off = memory["predicted_peak_bytes"] / memory["peak_above_baseline_bytes"] - 1
        assert abs(off) <= TOLERANCE, (more, memory)
