"""From the echoes of a gradient-echo acquisition to a local field, step by step."""

from collections.abc import Generator

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.background_removal import remove_background
from qsm_deploy.runtime.local_field.field_mapping import Echoes, map_field
from qsm_deploy.runtime.local_field.magnitude_mask import mask_from_magnitude
from qsm_deploy.runtime.local_field.unwrapping import require_memory
from qsm_deploy.runtime.scan.axes import STORED, Axes
from qsm_deploy.runtime.scan.wraps import undo_half_turns

Lines = Generator[str, None, tuple[Volume, Mask, list[str]]]
EMPTY = "the mask is empty; it must be non-zero inside the brain"


def local_field_from_echoes(
    echoes: Echoes,
    mask: Mask | None,
    geometry: Geometry,
    limit_bytes: float,
    stages: Stages,
    axes: Axes = STORED,
) -> Lines:
    """Yield a line after every step; return the local field [ppm], where it is known, and notes.

    Every step computes in canonical axes; what comes in and goes out is as it is stored.

    Parameters
    ----------
    echoes
        Phase and magnitude, whose slices may be corrected in place; the only reference to them,
        if their memory is to be free early.
    mask
        (x, y, z) bool, where the phase is to be trusted; ``None`` takes what gives signal.
    geometry
        The grid.
    limit_bytes
        The memory that the steps may take.
    stages
        Takes their time and memory.
    axes
        How canonical axes are made of those of the grid.

    Raises
    ------
    DataError
        If the mask is empty, or the echoes contradict each other.
    UnitsError
        If the phase is none.
    MemoryLimitError
        If unwrapping would take more memory than that.
    """
    with stages("mask"):
        echoes, geometry = echoes.turned(axes), axes.geometry(geometry)
        mask = None if mask is None else axes.turn(mask)
        origin = "of the magnitude" if mask is None else "as sent"
        inside = mask_from_magnitude(echoes.magnitude) if mask is None else mask
        if not inside.any():
            raise DataError(EMPTY)
        require_memory(inside, limit_bytes)
        notes = undo_half_turns(echoes.phase_rad, inside, axes)
    share = f"{100 * inside.mean():.0f} % of the volume"
    if mask is None:
        notes.insert(0, f"no mask given: taking the signal, {share}")
    yield f"mask {origin}, {share}"
    with stages("field mapping"):
        field, found = map_field(echoes, inside)
        notes += found
    del echoes
    yield "field mapped"
    with stages("background removal"):
        local, inside = remove_background(field, inside, geometry)
    yield "background removed"
    return axes.turn_back(local), axes.turn_back(inside), notes


def result_of(lines: Lines) -> tuple[Volume, Mask, list[str]]:
    """Return what :func:`local_field_from_echoes` does, without its lines."""
    while True:
        try:
            next(lines)
        except StopIteration as finished:
            local, inside, notes = finished.value
            return local, inside, notes
