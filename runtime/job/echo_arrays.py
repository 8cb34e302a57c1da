"""The local field of arrays that are in memory already."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.echoes import Echoes, require_echo_memory
from qsm_deploy.runtime.local_field.from_echoes import (
    STEPS,
    LocalField,
    Steps,
    local_field_from_total,
    result_of,
    total_field_from_echoes,
)
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.scan.arrays import affine_from, contradicted, mask_from, vector
from qsm_deploy.runtime.scan.axes import axes_of
from qsm_deploy.runtime.scan.units import require_wrapped_phase


def local_field_from_echoes(
    phase_rad: Any,
    magnitude: Any,
    mask: Any = None,
    *,
    echo_times_s: Sequence[float],
    field_strength_t: float,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float],
    axes: Any = None,
    steps: Steps = STEPS,
) -> LocalField:
    """Return the local field of a multi-echo gradient echo.

    Parameters
    ----------
    phase_rad
        (n, x, y, z) wrapped phase of each echo, which grows with the field.
    magnitude
        (n, x, y, z) signal of each echo, 0 or more.
    mask
        (x, y, z), non-zero in the brain; ``None`` finds it on the magnitude.
    echo_times_s, field_strength_t
        Of each echo, rising, and of B0.
    voxel_size_mm
        Along (x, y, z).
    b0_direction
        In voxel axes, of any non-zero norm.
    axes
        Where x, y and z run to: letters such as ``LPS``, or the affine to RAS [mm].
    steps
        What makes it.

    Returns
    -------
    LocalField
        In the axes of the arrays. Notes are issued as warnings, too.

    Raises
    ------
    DataError
        If an array has another shape or type or is not finite, or the echoes contradict each other.
    UnitsError
        If the phase is none.
    MemoryLimitError
        If a step would take more memory than there is.
    """
    phase, signal = (
        _echoes(name, array) for name, array in (("phase_rad", phase_rad), ("magnitude", magnitude))
    )
    if phase.shape != signal.shape or len(phase) != len(echo_times_s):
        raise DataError(
            f"phase {phase.shape}, magnitude {signal.shape} and {len(echo_times_s)} echo times; "
            "expected (n, x, y, z) twice, and n"
        )
    if signal.min() < 0:
        raise DataError("magnitude has negative values")
    _, x, y, z = phase.shape
    stored = Geometry((x, y, z), vector(voxel_size_mm), vector(b0_direction))
    require_echo_memory(len(phase), phase[0].size, limit := available_bytes())
    inside, notes = (None, []) if mask is None else mask_from(mask)
    if inside is not None and inside.shape != stored.shape:
        raise DataError(f"the mask has shape {inside.shape}, an echo {stored.shape}")
    notes += require_wrapped_phase(phase[-1] if inside is None else phase[-1][inside])
    affine = affine_from(axes, stored.voxel_size_mm)
    notes += contradicted(axes, affine, stored)
    to_canonical, times = axes_of(affine, stored), tuple(map(float, echo_times_s))
    echoes = Echoes(phase, signal, times, field_strength_t, stored).turned(to_canonical)
    inside = None if inside is None else to_canonical.turn(inside)
    how: dict[str, Any] = {"limit_bytes": limit, "stages": Stages()}
    total = result_of(total_field_from_echoes(echoes, inside, steps, axes=to_canonical, **how))
    made = local_field_from_total(total.found, total.brain, echoes.geometry, steps, **how)
    made.notes[:0] = [*notes, *total.notes]
    made.facts.update(total.facts | made.facts)
    for note in made.notes:
        warnings.warn(note, stacklevel=2)
    return made.turned(to_canonical.inverse)


def _echoes(name: str, array: Any) -> Volume:
    """Return an own float32 copy of the echoes."""
    values = np.asarray(array)
    if values.ndim != 4 or values.dtype.kind not in "fiu":
        raise DataError(
            f"{name} has shape {values.shape} and type {values.dtype}, expected real numbers "
            "(n, x, y, z)"
        )
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds NaN or Inf; set these voxels to 0")
    return np.array(values, dtype=np.float32)
