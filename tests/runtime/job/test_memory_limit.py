"""A memory limit holds for the process: what it is, what reading takes, what a backend asks for."""

import gzip
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import onnx
import pytest

from qsm_deploy.calibration.graph.graph_run import GraphRun
from qsm_deploy.calibration.int8.layers import int8_layers
from qsm_deploy.calibration.int8.qdq import Quantiser
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.job.memory_limit import (
    memory_errors,
    require_memory_to_load,
    within_process,
)
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

# prints the exit code and the peak of a run [bytes], which resets it for every stage but here
PROGRAM = """
import re, resource, sys
from pathlib import Path
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.console import peak_memory
peak_memory.CLEAR_REFS = Path("/dev/null")
if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
code = main(sys.argv[2:])
status = open("/proc/self/status").read()  # what getrusage says has its parent's peak in it
print(code, 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]))
"""
MIB = 1 << 20
NETWORK = ("--method", "tv-unet")


def run(*words, address_space=0):
    command = [sys.executable, "-c", PROGRAM, str(address_space), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    code, peak = done.stdout.split()[-2:]
    return int(code), int(peak), done.stderr


@pytest.fixture
def bomb(tmp_path):
    """Return a gzip file of 1 MB whose header announces 1 GiB of voxels, and which holds them."""
    header = nib.Nifti1Header()
    header.set_data_shape((512, 512, 1024))
    header.set_data_dtype(np.float32)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(1024):
            file.write(bytes(MIB))
    return path


def test_a_header_that_announces_too_much_is_refused_unread(bomb):
    code, peak, error = run(bomb, "--memory-limit", "500M")
    assert (code, peak < 500 * MIB) == (6, True)
    assert "bomb.nii.gz: its header announces 512x512x1024 voxels; reading them takes" in error
    assert error.count("\n") == 1


def test_every_file_is_looked_at_before_one_is_read(write_volume, bomb):
    phase = write_volume(np.zeros((8, 8, 8), np.float32), "phase.nii")
    times = ("--echo-times", "0.005", "0.01", "--field-strength", "3", "-m", phase)
    words = ("--phase", phase, phase, "--magnitude", phase, bomb, *times, "--method", "tkd")
    code, peak, error = run(*words, "--memory-limit", "500M")
    assert (code, peak < 250 * MIB) == (6, True), error
    assert "bomb.nii.gz: its header announces" in error


def test_what_a_file_cannot_hold_is_left_to_its_reader(tmp_path, bomb):
    cut = tmp_path / "cut.nii"
    with gzip.open(bomb) as whole:
        cut.write_bytes(whole.read(1000))
    require_memory_to_load([None, cut, tmp_path / "gone.nii"], MIB)
    cut.write_bytes(b"\x1f\x8b\0")
    require_memory_to_load([cut], MIB)


def test_volumes_that_stay_add_up(write_volume):
    paths = [write_volume(np.zeros((64, 64, 64), np.float32), f"{n}.nii") for n in range(3)]
    require_memory_to_load(paths[:2], 6 * MIB)
    with pytest.raises(MemoryLimitError, match=r"2\.nii: its header announces 64x64x64"):
        require_memory_to_load(paths, 6 * MIB)


def test_the_program_counts():
    limit = rss_bytes() + 100 * MIB
    left = within_process(Wants(memory_limit=limit), "cpu", [BUNDLED_MODEL]).memory_limit
    assert left == pytest.approx(100 * MIB, abs=50 * MIB)
    assert within_process(Wants(), "cpu", [BUNDLED_MODEL]).memory_limit is None
    assert within_process(Wants(memory_limit=MIB), "cuda:0", []).memory_limit == MIB
    with pytest.raises(MemoryLimitError, match="the program alone takes"):
        within_process(Wants(memory_limit=MIB), "cpu", [BUNDLED_MODEL])


@pytest.mark.parametrize(
    "says", ["std::bad_alloc", "Failed to allocate memory for requested buffer", "can't alloc"]
)
def test_a_backend_without_memory_is_no_broken_model(says):
    helps = "smaller --patch or --memory-limit"
    with pytest.raises(MemoryLimitError, match=helps), memory_errors():
        raise EngineError(f"ONNX Runtime failed ({says}); export the model again")
    with pytest.raises(EngineError), memory_errors():
        raise EngineError("ONNX Runtime failed (a shape); export the model again")


def test_threads_and_libraries_without_memory_are_no_bug():
    for error in (
        RuntimeError("can't start new thread"),
        EngineError("OpenVINO failed (Resource temporarily unavailable); export the model again"),
        ImportError("state.so: failed to map segment from shared object"),
    ):
        with pytest.raises(MemoryLimitError, match="smaller --patch"), memory_errors():
            raise error
    with pytest.raises(RuntimeError, match="a bug"), memory_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize(("backend", "mib"), [("onnxruntime", 600), ("openvino", 1000)])
def test_an_address_space_that_is_too_small(write_volume, backend, mib):
    path = write_volume(np.random.default_rng(0).normal(0, 0.02, (128,) * 3), "field.nii")
    words = (path, *NETWORK, "--backend", backend, "--patch", "off", "--threads", "1")
    code, _, error = run(*words, "--memory-limit", "64G", address_space=mib * MIB)
    assert code == 6, error
    assert "the limit is" in error  # not what was asked for: there can be no more than that
    code, _, error = run(*words[:1], "--memory-limit", "64G", address_space=mib * MIB // 2)
    assert code == 6, error


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the bundled network by precision, with the ranges of noise."""
    model, card = onnx.load(BUNDLED_MODEL), load_card(BUNDLED_MODEL)
    half = with_precision(model, "fp16")
    layers = int8_layers(model.graph, reducible_nodes(model.graph))
    tensors = sorted({layer.activation for layer in layers})
    noise, feeds = np.random.default_rng(0), {}
    for value in model.graph.input:
        shape = (1, 1, 16, 16, 16) if len(value.type.tensor_type.shape.dim) == 5 else (1,)
        feeds[value.name] = noise.standard_normal(shape, dtype=np.float32)
    seen = GraphRun(model, tensors).look(feeds)
    amax = {name: float(np.abs(value).max()) for name, value in zip(tensors, seen, strict=True)}
    whole = Quantiser.from_model(model, layers, amax).quantised(half, layers)
    folder = tmp_path_factory.mktemp("models")
    made = {"fp32": BUNDLED_MODEL, "fp16": folder / "fp16.onnx", "int8": folder / "int8.onnx"}
    made["fp16"].write_bytes(with_card(half, replace(card, precision="fp16")))
    options = {**card.options, "int8_in": "openvino"}
    made["int8"].write_bytes(with_card(whole, replace(card, precision="int8", options=options)))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["off", "auto"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_peak_stays_within_the_limit(write_volume, models, backend, precision, patch):
    field = np.random.default_rng(0).normal(0, 0.02, (48,) * 3).astype(np.float32)
    words = (models[precision], write_volume(field, "field.nii.gz"), "--force")
    words += ("--backend", backend, "--patch", patch, "--memory-limit")
    codes = []
    for mib in (100, 150, 170, 190, 240):
        code, peak, error = run(*words, f"{mib}M")
        assert code in (0, 6), error
        assert peak <= mib * MIB or (code, mib) == (6, 100)  # the program alone may take that
        codes.append(code)
    assert (codes[0], codes[-1]) == (6, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("mib", "code"), [(1000, 0), (300, 6)])
def test_the_peak_of_a_large_volume(write_volume, mib, code):
    field = np.random.default_rng(0).normal(0, 0.02, (160, 192, 160)).astype(np.float32)
    path = write_volume(field, "field.nii.gz")
    words = (path, *NETWORK, "--backend", "openvino", "--memory-limit", f"{mib}M")
    ended, peak, error = run(*words)
    assert (ended, peak <= mib * MIB) == (code, True), error
