"""Builds ``libqsm_cuda.so`` with CMake: ``python -m qsm_deploy.kernels.cuda_build``.

The compiler is the machine's nvcc, else the nvidia-cuda-nvcc wheel's; cuFFT the toolkit's, else
the nvidia-cufft wheel's. No GPU and no driver are needed.
"""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.kernels import cmake
from qsm_deploy.kernels.cmake import find_tool
from qsm_deploy.kernels.errors import EngineError

SOURCES = Path(__file__).resolve().parent
BUILD_FOLDER = SOURCES / "build"
LIBRARY_NAME = "libqsm_cuda.so"
PLUGIN_NAME = "libqsm_tensorrt.so"
WHEELS = "cu13"  # the folder of the package `nvidia` that NVIDIA's wheels for CUDA 13 share


def wheel_toolkit() -> Path | None:
    """Return the folder where NVIDIA's wheels keep bin/, include/ and lib/, if installed."""
    try:
        found = importlib.util.find_spec(f"nvidia.{WHEELS}")
    except ModuleNotFoundError:
        return None
    folders = found.submodule_search_locations if found else None
    return Path(folders[0]) if folders else None


def find_nvcc() -> Path | None:
    """Return the CUDA compiler: ``$CUDACXX``, on PATH, or from the wheel."""
    if given := os.environ.get("CUDACXX"):
        return Path(given)
    wheels = wheel_toolkit()
    from_wheel = wheels / "bin" / "nvcc" if wheels else None
    return find_tool("nvcc") or (from_wheel if from_wheel and from_wheel.exists() else None)


def build_cuda_library(
    folder: Path = BUILD_FOLDER,
    architectures: str | None = None,
    jobs: int = 2,
    tensorrt_include: Path | None = None,
) -> Path:
    """Build the library and return its path.

    Parameters
    ----------
    folder
        Where CMake builds.
    architectures
        As CMAKE_CUDA_ARCHITECTURES, ``90-real`` or ``80;90-real``; all that the toolkit and
        CMakeLists.txt know by default.
    jobs
        Compilers that run at the same time.
    tensorrt_include
        The folder of TensorRT's headers; if given, its plugin is built beside the library.

    Raises
    ------
    EngineError
        If there is no CMake or no CUDA compiler, or the build fails.
    """
    nvcc, wheels = find_nvcc(), wheel_toolkit()
    if not nvcc:
        raise EngineError(
            "nvcc was not found; install the CUDA toolkit, or its wheels with: pip install --group "
            "cuda"
        )
    configure = [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    environment = dict(os.environ)
    if wheels:
        configure.append(f"-DCUFFT_ROOT={wheels}")
        if nvcc == wheels / "bin" / "nvcc":
            # The wheel's nvcc looks for CUDA's runtime in lib64; the wheel has it in lib.
            paths = [str(wheels / "lib"), environment.get("LIBRARY_PATH", "")]
            environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    if tensorrt_include:
        configure.append(f"-DQSM_TENSORRT_INCLUDE={tensorrt_include.resolve()}")
    if architectures:
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    return cmake.build(SOURCES, folder, LIBRARY_NAME, configure, jobs=jobs, environment=environment)


def main(argv: Sequence[str] | None = None) -> int:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description="Build libqsm_cuda.so with CMake.")
    parser.add_argument("--folder", type=Path, default=BUILD_FOLDER)
    parser.add_argument("--architectures", help="as CMAKE_CUDA_ARCHITECTURES, e.g. 80;90-real")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--tensorrt-include", type=Path, help="folder of TensorRT's headers: builds its plugin too"
    )
    args = parser.parse_args(argv)
    return cmake.show(
        parser,
        lambda: build_cuda_library(
            args.folder, args.architectures, args.jobs, args.tensorrt_include
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
