"""From the echoes of a gradient-echo acquisition to a local field, step by step."""

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.background_removal import remove_background
from qsm_deploy.runtime.local_field.field_mapping import Echoes, map_field
from qsm_deploy.runtime.local_field.magnitude_mask import mask_from_magnitude
from qsm_deploy.runtime.local_field.unwrapping import require_memory

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]
Lines = Generator[str, None, tuple[Volume, Mask]]
EMPTY = "the mask is empty; it must be non-zero inside the brain"


def local_field_from_echoes(
    echoes: Echoes, mask: Mask | None, geometry: Geometry, limit_bytes: float, stages: Stages
) -> Lines:
    """Yield a line after every step, and return the local field [ppm] and where it is known.

    Parameters
    ----------
    echoes
        Phase and magnitude; the only reference to them, if their memory is to be free early.
    mask
        (x, y, z) bool, where the phase is to be trusted; ``None`` takes what gives signal.
    geometry
        The grid.
    limit_bytes
        The memory that the steps may take.
    stages
        Takes their time and memory.

    Raises
    ------
    DataError
        If the mask is empty.
    MemoryLimitError
        If unwrapping would take more memory than that.
    """
    with stages("mask"):
        origin = "of the magnitude" if mask is None else "as sent"
        inside = mask_from_magnitude(echoes.magnitude) if mask is None else mask
        if not inside.any():
            raise DataError(EMPTY)
        require_memory(inside, limit_bytes)
    yield f"mask {origin}, {100 * inside.mean():.0f} % of the volume"
    with stages("field mapping"):
        field = map_field(echoes, inside)
    del echoes
    yield "field mapped"
    with stages("background removal"):
        local, inside = remove_background(field, inside, geometry)
    yield "background removed"
    return local, inside


def result_of(lines: Lines) -> tuple[Volume, Mask, list[str]]:
    """Return what :func:`local_field_from_echoes` does, with its lines."""
    said = []
    while True:
        try:
            said.append(next(lines))
        except StopIteration as finished:
            return *finished.value, said
