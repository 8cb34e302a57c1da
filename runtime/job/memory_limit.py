"""``--memory-limit`` is of the whole process: what it takes already, and what reading takes."""

import gzip
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import nibabel as nib

from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.console.peak_memory import memory_text, rss_bytes
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.memory import (
    FLOAT,
    LIBRARIES_BYTES,
    available_bytes,
    bounded_bytes,
)
from qsm_deploy.runtime.reconstructor import Maker, gpu_number, models_of
from qsm_deploy.runtime.scan.gzip_members import GZIP_MAGIC
from qsm_deploy.runtime.scan.nifti import HEAD_BYTES

MOST_PACKED = 1032  # bytes that gzip makes of one
# how the backends say so, the loader of their libraries, and Python of the stack of a thread
NO_MEMORY = re.compile(
    r"bad_alloc|(fail\w* to|can't|cannot) alloc|(out of|not enough) memory|failed to map segment"
    r"|can't start new thread|resource temporarily unavailable",
    re.I,
)
# of what is left, for the plan: what a run takes is predicted, and not to the byte
PLANNED_SHARE = 0.95
HELP = "pass a smaller --patch or --memory-limit, or free memory"


def within_process(wants: Wants, device: str, maker: Maker) -> Wants:
    """Return wants whose memory limit is what the one of the whole process leaves to plan with.

    A limit of a GPU's memory stays, as does that of a call in somebody else's process.

    Raises
    ------
    MemoryLimitError
        If the program alone takes as much.
    """
    limit, models = wants.memory_limit, models_of(maker)
    if limit is None or gpu_number(device, models) is not None:
        return wants
    taken = rss_bytes()
    alone = taken + LIBRARIES_BYTES * bool(models)
    left = min(int(PLANNED_SHARE * (limit - taken)), bounded_bytes())
    if left <= alone - taken:
        raise MemoryLimitError(
            f"the program alone takes {memory_text(alone)}, the limit is {memory_text(limit)}; "
            "raise --memory-limit"
        )
    return replace(wants, memory_limit=left)


def require_memory_to_load(paths: Iterable[Path | None], limit_bytes: float | None) -> None:
    """Refuse volumes whose headers announce more than there is memory for, before reading them.

    What is wrong with a file besides is left to whoever reads it.

    Parameters
    ----------
    paths
        NIfTI files, in the order in which they are read.
    limit_bytes
        The memory they may take; ``None`` takes what is free.

    Raises
    ------
    MemoryLimitError
        If there is not enough.
    """
    limit = available_bytes() if limit_bytes is None else limit_bytes
    held = 0
    for path in paths:
        if path is None or (announced := _announced(path)) is None:
            continue
        shape, raw, floats = announced
        # the file, its voxels unpacked and as an array, and the float32 that stays
        needed = held + path.stat().st_size + 2 * raw + floats
        if needed > limit:
            raise MemoryLimitError(
                f"{path}: its header announces {shape_text(shape)} voxels; reading them "
                f"takes {memory_text(needed)}, the limit is {memory_text(limit)}; raise "
                "--memory-limit, free memory or crop the volume"
            )
        held += floats


@contextmanager
def memory_errors() -> Iterator[None]:
    """Tell a backend or a transform that gets no memory from one that fails.

    Raises
    ------
    MemoryLimitError
        If it says so.
    """
    try:
        yield
    except (EngineError, ImportError, RuntimeError) as error:
        if NO_MEMORY.search(str(error)):
            seen = str(error).partition("; ")[0]  # what follows is for a model that is broken
            raise MemoryLimitError(f"{seen}: there is too little memory; {HELP}") from error
        raise


def _announced(path: Path) -> tuple[tuple[int, ...], int, int] | None:
    """Return the shape in a header, and the bytes of its voxels as they are and as float32.

    They are no more than the file can hold, which whoever reads it finds truncated.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        most = path.stat().st_size
        with path.open("rb") as file:
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        with gzip.open(path) if packed else path.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return None
    kinds = (nib.Nifti1Header, nib.Nifti2Header)
    kind = next((kind for kind in kinds if kind.may_contain_header(head)), None)
    if kind is None:
        return None
    try:
        header = kind.from_fileobj(BytesIO(head[: kind.sizeof_hdr]), check=False)
        shape = tuple(int(n) for n in header.get_data_shape())
        voxel_bytes = int(header.get_data_dtype().itemsize)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return None
    if min(shape, default=0) < 1:
        return None
    most *= MOST_PACKED if packed else 1
    voxels = math.prod(shape)
    return shape, min(voxels * voxel_bytes, most), FLOAT * voxels * (voxels * voxel_bytes <= most)
