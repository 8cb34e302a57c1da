"""Builds a native library with CMake, and says what failed."""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qsm_deploy.kernels.errors import EngineError


def find_tool(name: str) -> Path | None:
    """Return the path of a program on PATH or in this Python's environment."""
    folders = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found) if found else None


def build(
    sources: Path,
    folder: Path,
    library: str,
    options: Sequence[str],
    *,
    jobs: int,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Configure, build, and return the library's path.

    Parameters
    ----------
    sources
        The folder of CMakeLists.txt.
    folder
        Where CMake builds.
    library
        The file name of the library.
    options
        Of the configuration, as ``-DNAME=VALUE``.
    jobs
        Compilers that run at the same time.
    environment
        Of CMake and the compilers; this process's by default.

    Raises
    ------
    EngineError
        If there is no CMake, or the build fails.
    """
    cmake = find_tool("cmake")
    if not cmake:
        raise EngineError("cmake was not found; install it, or with: pip install --group native")
    configure = [str(cmake), "-S", str(sources), "-B", str(folder), *options]
    for command in (configure, [str(cmake), "--build", str(folder), "--parallel", str(jobs)]):
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            lines = (run.stdout + run.stderr).strip().splitlines()
            raise EngineError(
                f"building {library} failed: {' '.join(command)}\n" + "\n".join(lines[-40:])
            )
    return folder / library


def show(parser: argparse.ArgumentParser, built: Callable[[], Path]) -> int:
    """Build from a command line: print the library's path, or end with what failed."""
    try:
        library = built()
    except EngineError as error:
        parser.exit(error.exit_code, f"{error}\n")
    sys.stdout.write(f"{library}\n")
    return 0
