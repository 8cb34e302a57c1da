"""What TensorRT measured of its kernels in earlier builds, so that it measures only what is new.

One file for each version and GPU under ``$XDG_CACHE_HOME/qsm-deploy``. It makes a build faster and
is no engine: engines are built anew whenever they are asked for. TensorRT for RTX measures nothing
when it builds.
"""

import contextlib
import hashlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.atomic import write_atomically
from qsm_deploy.runtime.console.user_cache import cache_folder
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Library

if TYPE_CHECKING:
    import tensorrt

DIGEST = hashlib.sha256().digest_size


def timing_cache_file(library: Library, gpu: str) -> Path:
    """Return where the timings of a library on a GPU are kept."""
    name = re.sub(r"[^\w.+-]+", "_", f"{library.__name__}-{library.__version__}-{gpu}")
    return cache_folder() / "timing" / f"{name}.cache"


def attach_timing_cache(
    config: "tensorrt.IBuilderConfig", file: Path, say: Callable[[str], None]
) -> bool:
    """Give a build the timings of earlier ones, and tell the user.

    A file that is damaged, or was measured elsewhere, counts as none.

    Returns
    -------
    bool
        Whether the library has timings to keep.
    """
    if not hasattr(config, "create_timing_cache"):
        return False
    kept = _read(file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached = _attach(config, kept)
    if any(issubclass(warning.category, DeprecationWarning) for warning in caught):
        return False  # so TensorRT for RTX says that it does nothing
    if attached and kept:
        say(f"reusing the kernel timings in {file}")
    elif file.exists():
        say(f"not reusing {file}: it is damaged or was measured elsewhere")
    return attached or _attach(config, b"")


def save_timing_cache(
    config: "tensorrt.IBuilderConfig", file: Path, say: Callable[[str], None]
) -> None:
    """Keep the timings of a build; a folder that cannot be written to is no error."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    timings = bytes(cache.serialize())
    if timings == _read(file):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, hashlib.sha256(timings).digest() + timings, force=True)
    except (OSError, DataError) as error:
        say(f"not keeping the kernel timings: {error}")


def _attach(config: "tensorrt.IBuilderConfig", timings: bytes) -> bool:
    cache = config.create_timing_cache(timings)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def _read(file: Path) -> bytes:
    """Return the timings in a file, or none if it is not whole."""
    data = b""
    with contextlib.suppress(OSError):
        data = file.read_bytes()
    digest, timings = data[:DIGEST], data[DIGEST:]
    return timings if hashlib.sha256(timings).digest() == digest else b""
