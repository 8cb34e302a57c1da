"""The TensorRT plugin in C++, against TensorRT's headers and, where there is one, its runtime.

``QSM_TENSORRT_INCLUDE`` names the folder of NvInferRuntime.h; without it there is nothing to
compile. No GPU is needed: the host twin stands in for it.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from ctypes import byref, c_float, c_int64, c_void_p
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.kernels.cuda_abi import Status
from qsm_deploy.kernels.cuda_build import PLUGIN_NAME, build_cuda_library
from qsm_deploy.kernels.dipole import dipole_convolve, tikhonov, tkd
from qsm_deploy.kernels.geometry import Geometry

RUNTIMES = ("tensorrt", "tensorrt_lean_bindings")  # whose registry loads plugins
GEOMETRY = Geometry((6, 7, 8), (0.5, 0.75, 2.0), (0.25, -0.5, 0.75))
NUMPY = {
    "dipole": lambda x: dipole_convolve(x, GEOMETRY),
    "dipole_squared": lambda x: dipole_convolve(x, GEOMETRY, power=2),
    "tkd": lambda x: tkd(x, GEOMETRY, threshold=0.15),
    "tikhonov": lambda x: tikhonov(x, GEOMETRY, lam=0.02),
}
SIZES = (2, 3, *GEOMETRY.shape)


@pytest.fixture
def twin(plugin_twin):
    plugin_twin.tensorrt_twin_heard.restype = ctypes.c_char_p
    plugin_twin.host_twin_set_gpu(Status.OK)
    plugin_twin.qsm_cuda_release_plans()
    yield plugin_twin
    plugin_twin.host_twin_set_gpu(Status.OK)


def run(twin, multiplier, x, smallest=SIZES, threshold=0.15, lam=0.02):
    """Return the status, the output, and what the logger was told last."""
    vectors = [np.float32(GEOMETRY.voxel_size_mm), np.float32(GEOMETRY.b0_direction)]
    y = np.full_like(x, np.nan)
    status = twin.tensorrt_twin_run(
        multiplier.encode(),
        byref(c_float(threshold)),
        byref(c_float(lam)),
        (c_int64 * 5)(*smallest),
        (c_int64 * 5)(*x.shape),
        (c_void_p * 3)(*(array.ctypes.data for array in (x, *vectors))),
        c_void_p(y.ctypes.data),
    )
    return status, y, twin.tensorrt_twin_heard().decode()


def volumes():
    return np.random.default_rng(0).standard_normal(SIZES, dtype=np.float32)


@pytest.mark.parametrize("smallest", [SIZES, (1, 1, 4, 7, 5)], ids=["one shape", "any shape"])
@pytest.mark.parametrize("multiplier", NUMPY)
def test_it_is_the_operator_through_tensorrt_s_interfaces(twin, multiplier, smallest):
    x = volumes()
    status, y, heard = run(twin, multiplier, x, smallest)
    assert status == Status.OK, heard
    for index in np.ndindex(SIZES[:2]):
        expected = NUMPY[multiplier](x[index])
        assert np.linalg.norm(y[index] - expected) <= 1e-6 * np.linalg.norm(expected)


def test_what_goes_wrong_reaches_logger_and_recorder(twin):
    twin.host_twin_set_gpu(Status.NO_GPU)
    status, _, heard = run(twin, "tkd", volumes())
    assert status == Status.NO_GPU
    assert heard == "E DipoleConv: as the test wishes"


@pytest.mark.parametrize(
    ("multiplier", "threshold", "message"),
    [("cube", 0.1, "unknown multiplier 'cube'"), ("tkd", 0.7, "threshold must lie in (0, 2/3]")],
)
def test_a_node_that_cannot_be_is_not_made(twin, multiplier, threshold, message):
    status, _, heard = run(twin, multiplier, volumes(), threshold=threshold)
    assert status == -2
    assert heard.startswith("E DipoleConv: ")
    assert message in heard


@pytest.fixture(scope="module")
def plugin(tensorrt_include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    build_cuda_library(folder, "90-real", tensorrt_include=tensorrt_include)
    return folder / PLUGIN_NAME


def test_it_shows_what_tensorrt_looks_for_and_needs_no_library_of_tensorrt(plugin):
    read = [shutil.which("nm") or "nm", "-D", str(plugin)]
    lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout.splitlines()
    defined = {line.split()[-1] for line in lines if re.match(r"[0-9a-f]{16} ", line)}
    assert defined == {"getCreators", "setLoggerFinder"}
    assert not [line for line in lines if "nvinfer" in line.lower()]


LOAD = """
import numpy as np
import {runtime} as trt

registry = trt.get_plugin_registry()
registry.load_library({plugin!r})
creator = registry.get_creator("DipoleConv", "1", "")
print([(field.name, field.type.name) for field in creator.field_names])
threshold = np.array([0.15], np.float32)
for multiplier in (b"tkd", b"cube"):
    fields = [
        trt.PluginField("multiplier", multiplier, trt.PluginFieldType.CHAR),
        trt.PluginField("threshold", threshold, trt.PluginFieldType.FLOAT32),
    ]
    fields = trt.PluginFieldCollection(fields)
    print(creator.create_plugin("node", fields, trt.TensorRTPhase.RUNTIME) is not None)
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tensorrt_loads_it_by_its_path(plugin, tensorrt_include, runtime):
    if not importlib.util.find_spec(runtime):
        pytest.skip(f"no TensorRT runtime {runtime}")
    header = (tensorrt_include / "NvInferVersion.h").read_text()
    major = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", header)[1]
    version = f"import {runtime}; print({runtime}.__version__)"
    seen = subprocess.run([sys.executable, "-c", version], capture_output=True, text=True)
    if seen.returncode or not seen.stdout.startswith(f"{major}."):
        pytest.skip(f"no TensorRT runtime of version {major}")
    code = LOAD.format(runtime=runtime, plugin=str(plugin))
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    fields, made, refused = loaded.stdout.splitlines()
    assert fields == "[('multiplier', 'CHAR'), ('threshold', 'FLOAT32'), ('lambda', 'FLOAT32')]"
    assert (made, refused) == ("True", "False")
    assert "unknown multiplier 'cube'" in loaded.stdout + loaded.stderr
