"""The driver's functions as they are called, with a driver in C that computes nothing."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qsm_deploy.kernels import cuda_driver
from qsm_deploy.kernels.cuda_driver import CudaDriver, Gpu, open_cuda_driver
from qsm_deploy.kernels.errors import EngineError

SOURCE = Path(__file__).with_name("fake_driver.c")
STREAM, EVENT, OTHER = 0x7FFF00000100, 0x7FFF00000200, 0x7FFF00000300


@pytest.fixture(scope="module")
def handle(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("driver") / "libcuda_fake.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-x", "c"]
    run = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], capture_output=True)
    assert run.returncode == 0, run.stderr
    handle = ctypes.CDLL(str(library))
    handle.fake_trace.restype = ctypes.c_char_p
    return handle


@pytest.fixture
def driver(handle: ctypes.CDLL) -> CudaDriver:
    handle.fake_reset(0)
    return CudaDriver(handle)


@pytest.fixture
def trace(handle: ctypes.CDLL) -> Callable[[], list[str]]:
    return lambda: handle.fake_trace().decode().replace("(nil)", "0x0").split(";")[:-1]


def test_it_says_what_gpus_there_are(driver: CudaDriver) -> None:
    assert driver.version == "13.2"
    assert driver.gpu(0) == Gpu(0, "Fake 40", (8, 6), 40 << 30)
    assert str(driver.gpu(0)) == "sm_86 Fake 40"
    assert driver.gpu(1).architecture == "sm_120"


@pytest.mark.parametrize("number", [-1, 2])
def test_a_gpu_that_is_not_there_is_an_error(driver: CudaDriver, number: int) -> None:
    with pytest.raises(EngineError, match=f"no GPU {number}; this machine has 0 to 1"):
        driver.gpu(number)


def test_handles_keep_all_their_bits(driver: CudaDriver, trace) -> None:
    driver.make_current(1)
    assert (driver.create_stream(), driver.create_event()) == (STREAM, EVENT)
    driver.order(OTHER, STREAM, EVENT)
    driver.destroy(STREAM, EVENT)
    assert trace() == [
        "current 0x700000000029 0x0",
        f"record {EVENT:#x} {OTHER:#x}",
        f"after {STREAM:#x} {EVENT:#x}",
        f"wait {STREAM:#x} 0x0",
        f"free {STREAM:#x} 0x0",
        f"free {EVENT:#x} 0x0",
    ]


def test_what_the_driver_says_is_said(driver: CudaDriver, handle: ctypes.CDLL) -> None:
    handle.fake_reset(4)
    with pytest.raises(EngineError, match="cuEventRecord: an illegal memory access"):
        driver.order(OTHER, STREAM, EVENT)
    handle.fake_reset(3)
    with pytest.raises(EngineError, match="no handle"):
        driver.create_stream()
    handle.fake_reset(2)
    with pytest.raises(EngineError, match="this machine has none"):
        driver.gpu(0)
    handle.fake_reset(1)
    with pytest.raises(EngineError, match="fails in cuInit: error 100"):
        CudaDriver(handle)


@pytest.mark.parametrize("library", ["libcuda_that_is_missing.so.1", "libc.so.6"])
def test_without_a_driver_one_line_says_so(library: str, monkeypatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", library)
    with pytest.raises(EngineError, match="no NVIDIA driver") as caught:
        open_cuda_driver()
    assert caught.value.exit_code == 4
