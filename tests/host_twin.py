"""The CUDA library's own sources compiled for the host."""

import ctypes
import subprocess
from pathlib import Path

from qsm_deploy.kernels.cuda_abi import declare
from qsm_deploy.kernels.cuda_build import SOURCES

CSRC = SOURCES / "csrc"
KERNEL_TESTS = Path(__file__).parent / "kernels"
TWIN_SOURCES = [
    *(CSRC / f"{name}.cu" for name in ("dipole", "patches", "total_variation", "vectors")),
    CSRC / "status.cpp",
    *(KERNEL_TESTS / name for name in ("host_twin.cpp", "host_twin_node.cpp")),
]
TWIN_FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-shared"),
    *("-Wall", "-Wextra", "-Wconversion", "-Werror"),
]


def build_host_twin(compiler: str, folder: Path, *more: str) -> ctypes.CDLL:
    """Compile it into a folder, with what else is named."""
    library = folder / "libqsm_twin.so"
    sources = ["-x", "c++", *map(str, TWIN_SOURCES), *more]
    command = [compiler, *TWIN_FLAGS, f"-I{CSRC}", "-o", str(library), *sources]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    handle = ctypes.CDLL(str(library))
    declare(handle)
    return handle
