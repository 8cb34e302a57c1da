"""qsm-run --method tv on a made-up GPU, and arrays that lie there: maps and reports of the CPU."""

import json

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.model import open_model
from tests.made_up_gpu import CupyLike, read

AFFINE = np.diag([3.0, 2.5, 4.0, 1.0])  # few voxels of padding
VOXEL_MM = (3.0, 2.5, 4.0)


@pytest.fixture
def on_fake_gpu(monkeypatch, place):
    """Let every GPU be the made-up one."""
    asked = []

    def open_place(number):
        asked.append(number)
        return place

    monkeypatch.setattr("qsm_deploy.runtime.gpu.open.open_place", open_place)
    return asked


def run(tmp_path, name, *arguments):
    output, report = tmp_path / f"{name}.nii", tmp_path / f"{name}.report.json"
    code = main([*map(str, arguments), "-o", str(output), "--report", str(report), "-q"])
    assert code == 0
    return nib.load(output).get_fdata(), json.loads(report.read_text())


@pytest.mark.parametrize("flags", [("--method", "tv", "--alpha", "2e-4"), ("--iterations", "3")])
def test_it_writes_what_the_cpu_writes(
    on_fake_gpu, fake_device, tmp_path, write_volume, field, flags
):
    volume = write_volume(field, "field.nii", AFFINE)
    cpu, on_cpu = run(tmp_path, "cpu", volume, *flags)
    gpu, on_gpu = run(tmp_path, "gpu", volume, "--device", "cuda:2", *flags)
    assert on_fake_gpu == [2]
    assert np.linalg.norm(gpu - cpu) <= 1e-5 * np.linalg.norm(cpu)
    assert on_gpu["model"] == on_cpu["model"]
    assert on_gpu["backend"]["device"] == "cuda:0 (a made-up GPU)"
    assert on_gpu["backend"]["name"] == "cufft"
    found, expected = on_gpu["inversion"], on_cpu["inversion"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-4) if type(value) is float else value)
    assert on_gpu["field_residual"] == pytest.approx(on_cpu["field_residual"], rel=1e-4)
    assert on_gpu["plan"]["predicted_peak_bytes"] == fake_device.peak_bytes
    assert {"noise", "upload", "inversion", "field residual", "download"} <= on_gpu[
        "seconds"
    ].keys()


def test_what_a_gpu_does_not_do_is_said(on_fake_gpu, write_volume, field, capsys):
    volume = str(write_volume(field, "field.nii", AFFINE))
    signal = str(write_volume(np.abs(field) + 1, "magnitude.nii", AFFINE))
    for flags, text in (
        (("--method", "tkd"), "tkd runs on the CPU; drop --device cuda:0"),
        (("--robust",), "tv --robust runs on the CPU"),
        (("--magnitude", signal), "trusts all voxels alike"),
        (("--noise-map", signal), "trusts all voxels alike"),
        (("--data-consistency", "auto"), "explains its field already"),
    ):
        assert main([volume, "--device", "cuda:0", *flags]) == 2
        assert text in capsys.readouterr().err


def test_a_volume_too_large_is_refused_before_it_is_run(
    on_fake_gpu, fake_device, write_volume, field, capsys
):
    volume = str(write_volume(field, "field.nii", AFFINE))
    arguments = [volume, "--device", "cuda:0", "--dry-run", "--json"]
    assert main(arguments) == 0
    needed = json.loads(capsys.readouterr().out)["plan"]["predicted_peak_bytes"]
    assert main([*arguments, "--memory-limit", str(needed)]) == 0
    assert main([*arguments, "--memory-limit", str(needed - 1)]) == 6
    fake_device.capacity = 1000
    assert main(arguments) == 6
    assert "tv would need" in capsys.readouterr().err


class TestArrays:
    """A field that lies on the GPU gives a map that stays there."""

    GRID = {"voxel_size_mm": VOXEL_MM, "b0_direction": (0.1, -0.2, 0.97)}  # noqa: RUF012

    @pytest.fixture
    def model(self, on_fake_gpu):
        return open_model(method="tv", iterations=3, device="cuda:0")

    @pytest.mark.parametrize("axes", [None, "RAS", "LPS", "AIL"])
    def test_the_map_is_that_of_the_host(self, model, fake_device, field, axes):
        mask = field != 0
        there = [CupyLike(fake_device, np.where(mask, field, np.float32(np.nan)))]
        there += [CupyLike(fake_device, mask)]
        chi = model.reconstruct(*there, **self.GRID, axes=axes)
        expected = model.reconstruct(field, mask, **self.GRID, axes=axes)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_array_equal(read(fake_device, chi), expected)
        del chi
        for array in there:
            array.free()

    def test_what_cannot_be(self, model, fake_device, field):
        mask, broken = field != 0, field.copy()
        broken[8, 8, 8] = np.inf
        there = CupyLike(fake_device, broken)
        with pytest.raises(DataError, match="NaN or Inf inside the mask"):
            model.reconstruct(there, mask, **self.GRID)
        with pytest.raises(UsageError, match="taken alone"):
            model.reconstruct(there, mask, magnitude=np.ones_like(field), **self.GRID)
        on_cpu = open_model(method="tv")
        with pytest.raises(UsageError, match="is not on a GPU"):
            on_cpu.reconstruct(there, mask, **self.GRID)
        there.free()
