"""Builds ``libqsm_runtime.so`` with CMake: ``python -m qsm_deploy.runtime.c.build``.

Headers and libraries of OpenVINO are those inside its wheel, or of ``--openvino``.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.kernels import cmake
from qsm_deploy.kernels.errors import MissingDependencyError

SOURCES = Path(__file__).resolve().parent
BUILD_FOLDER = SOURCES / "build"
LIBRARY_NAME = "libqsm_runtime.so"


def openvino_cmake() -> Path:
    """Return the folder of ``OpenVINOConfig.cmake`` inside the wheel.

    Raises
    ------
    MissingDependencyError
        If the wheel is not installed.
    """
    found = importlib.util.find_spec("openvino")  # not imported: a build needs none of it
    if found is None or found.origin is None:
        raise MissingDependencyError("openvino", "openvino", "libqsm_runtime")
    return Path(found.origin).with_name("cmake")


def build_c_library(
    folder: Path = BUILD_FOLDER,
    *,
    openvino: Path | None = None,
    options: Sequence[str] = (),
    jobs: int = 2,
) -> Path:
    """Build the library and return its path.

    Parameters
    ----------
    folder
        Where CMake builds.
    openvino
        The folder of ``OpenVINOConfig.cmake``; that of the wheel by default.
    options
        More for CMake, as ``-DNAME=VALUE``.
    jobs
        Compilers that run at the same time.

    Raises
    ------
    EngineError
        If there is no CMake, or the build fails.
    MissingDependencyError
        If there is no OpenVINO.
    """
    needed = (
        []
        if any("QSM_FAKE_ENGINE" in o for o in options)
        else [f"-DOpenVINO_DIR={openvino or openvino_cmake()}"]
    )
    return cmake.build(SOURCES, folder, LIBRARY_NAME, [*needed, *options], jobs=jobs)


def main(argv: Sequence[str] | None = None) -> int:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description="Build libqsm_runtime.so with CMake.")
    parser.add_argument("--folder", type=Path, default=BUILD_FOLDER)
    parser.add_argument("--openvino", type=Path, help="folder of OpenVINOConfig.cmake")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(argv)
    return cmake.show(
        parser, lambda: build_c_library(args.folder, openvino=args.openvino, jobs=args.jobs)
    )


if __name__ == "__main__":
    raise SystemExit(main())
