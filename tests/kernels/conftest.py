"""The CUDA library as built, and its host twin: the same sources compiled without CUDA."""

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.kernels.cmake import find_tool
from qsm_deploy.kernels.cuda_abi import declare
from qsm_deploy.kernels.cuda_build import SOURCES, build_cuda_library, find_nvcc, wheel_toolkit
from qsm_deploy.kernels.cuda_library import LIBRARY_VARIABLE, CudaLibrary

CSRC = SOURCES / "csrc"
TESTS = Path(__file__).parent


def load(path: Path) -> ctypes.CDLL:
    handle = ctypes.CDLL(str(path))
    declare(handle)
    return handle


@pytest.fixture(scope="session")
def plugin_twin(
    build_twin: Callable[..., ctypes.CDLL],
    tensorrt_include: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> ctypes.CDLL:
    """Return the TensorRT plugin with the host twin, and what does as TensorRT does."""
    nvcc, wheels = find_nvcc(), wheel_toolkit()
    toolkits = [nvcc.resolve().parents[1]] if nvcc else []
    includes = [folder / "include" for folder in (*toolkits, wheels) if folder]
    names = ("creator", "plugin", "report")
    return build_twin(
        tmp_path_factory.mktemp("plugin_twin"),
        *(str(CSRC / f"tensorrt_{name}.cpp") for name in names),
        str(TESTS / "tensorrt_twin.cpp"),
        *(f"-isystem{folder}" for folder in (tensorrt_include, *includes)),
    )


@pytest.fixture
def twin(twin_handle: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """Return the host twin with no plans and all levers at rest."""

    def rest() -> None:
        twin_handle.host_twin_set_gpu(0)
        twin_handle.host_twin_set_capturing(0)
        twin_handle.host_twin_fail_plans(0)
        twin_handle.qsm_cuda_release_plans()

    rest()
    yield twin_handle
    rest()


@pytest.fixture(scope="session")
def cuda_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library, built for all GPUs that the toolkit knows."""
    if not find_nvcc() or not find_tool("cmake"):
        pytest.skip("no CUDA compiler or no CMake")
    return build_cuda_library(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def cuda_handle(cuda_path: Path) -> ctypes.CDLL:
    return load(cuda_path)


@pytest.fixture(scope="session")
def gpu_architecture() -> str:
    """Return what CMake calls the architecture of the first GPU; skip where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        pytest.skip(f"no GPU: {error}")
    gpu, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if status := driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(gpu), 0):
        pytest.skip(f"no GPU: CUDA driver error {status}")
    for value, attribute in ((major, 75), (minor, 76)):
        DeviceMemory.check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, gpu))
    return f"{major.value}{minor.value}-real"


@pytest.fixture(scope="session")
def gpu_handle(gpu_architecture: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Return the library, built for this machine's GPU alone, or the one that is named."""
    named = os.environ.get(LIBRARY_VARIABLE)
    folder = tmp_path_factory.mktemp("gpu")
    return load(Path(named) if named else build_cuda_library(folder, gpu_architecture))


class HostMemory:
    """Memory that the host twin computes in, aligned as cudaMalloc's."""

    exact = True  # same operations in the same order as numpy

    def upload(self, array: np.ndarray) -> tuple[int, np.ndarray]:
        """Return a pointer to a copy, and what keeps it alive."""
        store = np.empty(array.nbytes + 256, np.uint8)
        offset = -store.ctypes.data % 256
        copy = store[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy.ctypes.data, copy

    def download(self, held: np.ndarray) -> np.ndarray:
        return held.copy()


class DeviceMemory:
    """Memory of the GPU, through the driver's C functions."""

    exact = False  # contracted multiplications and additions

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        context, gpu = ctypes.c_void_p(), ctypes.c_int()
        self.check(self.driver.cuInit(0))
        self.check(self.driver.cuDeviceGet(ctypes.byref(gpu), 0))
        self.check(self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu))
        self.check(self.driver.cuCtxSetCurrent(context))

    @staticmethod
    def check(result: int) -> None:
        assert result == 0, f"CUDA driver error {result}"

    def upload(self, array: np.ndarray) -> tuple[int, tuple[ctypes.c_uint64, np.ndarray]]:
        pointer, source = ctypes.c_uint64(), np.ascontiguousarray(array)
        self.check(self.driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(source.nbytes)))
        self.check(
            self.driver.cuMemcpyHtoD_v2(
                pointer, ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.nbytes)
            )
        )
        return pointer.value, (pointer, source)

    def download(self, held: tuple[ctypes.c_uint64, np.ndarray]) -> np.ndarray:
        pointer, source = held
        result = np.empty_like(source)
        self.check(self.driver.cuCtxSynchronize())
        self.check(
            self.driver.cuMemcpyDtoH_v2(
                ctypes.c_void_p(result.ctypes.data), pointer, ctypes.c_size_t(result.nbytes)
            )
        )
        return result


class Device:
    """A library and the memory it computes in."""

    def __init__(self, handle: ctypes.CDLL, memory: HostMemory | DeviceMemory) -> None:
        self.library, self.memory = CudaLibrary(handle), memory


@pytest.fixture(scope="session")
def twin_device(twin_handle: ctypes.CDLL) -> Device:
    return Device(twin_handle, HostMemory())


@pytest.fixture(params=["host twin", "gpu"])
def device(request: pytest.FixtureRequest) -> Device:
    """Return the host twin, and where there is a GPU the library on it."""
    if request.param == "host twin":
        return Device(request.getfixturevalue("twin"), HostMemory())
    handle = request.getfixturevalue("gpu_handle")
    if handle.qsm_cuda_probe(None):
        pytest.skip(f"no GPU: {handle.qsm_cuda_last_error().decode()}")
    return Device(handle, DeviceMemory())
