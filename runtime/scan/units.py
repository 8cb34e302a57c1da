"""Field maps in ppm, ppb, Hz, rad/s, tesla or rad, and how one becomes the other."""

import math

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError, UnitsError
from qsm_deploy.runtime.scan.unit_names import GYROMAGNETIC_MHZ_PER_T, UNITS, FieldUnit

PPB_PER_PPM = 1000.0
USUAL_P99_PPM = (0.005, 0.1)  # of local fields of heads
LARGEST_PPM = 100.0  # that noise may reach in a weak field; no tissue does
SMALL_OFFSET = 0.2  # of the deviation; costs a map of total variation some three points of NRMSE
# a field beyond is not in the unit that it is taken for, unless somebody says it is in ppm
POSSIBLE_P99_PPM, STATED_P99_PPM = (1e-3, 0.3), (1e-5, 1.0)
TOTAL_STD_PPM = (0.002, 3.0)  # of any part of a head; of whole ones 0.05 to 0.5
TYPICAL_T, TYPICAL_ECHO_S = 3.0, 0.02
SMALLEST_WRAPPED_RAD = 0.05
USUAL_WRAPPED_RAD = 2.5


def ppm_per_unit(
    unit: FieldUnit, *, echo_time_s: float | None, field_strength_t: float | None
) -> float:
    """Return what one ``unit`` of field is in ppm.

    Parameters
    ----------
    unit
        ``ppm`` and ``ppb`` of B0, ``hz``, ``rad/s``, ``tesla``, or ``rad`` of phase at
        ``echo_time_s``.
    echo_time_s
        Echo time [s], needed for ``rad``.
    field_strength_t
        Strength of B0 [T], needed for all but ``ppm`` and ``ppb``.

    Raises
    ------
    UnitsError
        If a needed value is missing, not positive, or outside what a scanner does.
    """
    if unit == "ppm" or unit == "ppb":
        return 1.0 if unit == "ppm" else 1 / PPB_PER_PPM
    if field_strength_t is None:
        raise UnitsError(f"--units {unit} needs the strength of B0: pass --field-strength in tesla")
    if not 0.01 <= field_strength_t <= 30:
        raise UnitsError(
            f"a field strength of {field_strength_t:g} T cannot be right; give it in tesla, for "
            "example 3"
        )
    hertz = 1 / (GYROMAGNETIC_MHZ_PER_T * field_strength_t)
    if unit == "tesla":
        return 1e6 / field_strength_t
    if unit != "rad":
        return hertz if unit == "hz" else hertz / (2 * math.pi)
    if echo_time_s is None:
        raise UnitsError(
            "--units rad needs the one echo time of the phase: pass --echo-time in seconds"
        )
    if not 1e-4 <= echo_time_s <= 0.5:
        raise UnitsError(
            f"an echo time of {echo_time_s:g} s cannot be right (is it in ms?); give it in "
            "seconds, for example 0.02"
        )
    return hertz / (2 * math.pi * echo_time_s)


def require_ppm(
    local_field_ppm: NDArray[np.float32], unit: FieldUnit, *, stated: bool = True
) -> list[str]:
    """Refuse a field that cannot be in ppm, and return notes on one that is unlikely to be.

    Parameters
    ----------
    local_field_ppm
        (voxels,) field inside the mask, finite.
    unit
        The unit it was converted from.
    stated
        Whether somebody said that it is in this unit.

    Raises
    ------
    UnitsError
        If it is zero everywhere, or its 99th percentile is too large or too small: beyond 0.001
        to 0.3 ppm, or beyond 0.00001 to 1 ppm where it is said to be in ppm.
    """
    size = np.abs(local_field_ppm)
    if not size.any():
        raise UnitsError("the field is zero in the whole mask; check the field and the mask")
    p99 = float(np.percentile(size, 99))
    sure = stated and unit == "ppm"
    least, most = STATED_P99_PPM if sure else POSSIBLE_P99_PPM
    if not least <= p99 <= most:
        much = f"too {'much' if p99 > most else 'little'} for tissue ({least:g} to {most:g})"
        raise UnitsError(
            f"the field's 99th percentile is {p99:.3g} ppm, {much}: {_advice(p99, unit, stated)}"
        )
    if far := int(np.count_nonzero(size > LARGEST_PPM)):
        raise UnitsError(
            f"{far} voxels inside the mask hold up to {size.max():.3g} ppm, which no tissue makes; "
            "take them out of the mask"
        )
    notes = []
    low, high = USUAL_P99_PPM
    if not low <= p99 <= high:
        notes.append(
            f"the field's 99th percentile is {p99:.2g} ppm, usually it lies between {low:g} and "
            f"{high:g}: check its unit, the scaling in its header, and that the background was "
            "removed"
        )
    offset, deviation = float(np.median(local_field_ppm)), float(local_field_ppm.std())
    # the median of few voxels says little
    if abs(offset) > (SMALL_OFFSET + 5 / math.sqrt(size.size)) * deviation:
        notes.append(
            f"the field's median in the mask is {offset:.2g} ppm, its deviation {deviation:.2g}: "
            "no tissue makes such an offset, and the map errs for it; subtract it from the field"
        )
    return notes


def require_total_ppm(total_field_ppm: NDArray[np.float32], unit: FieldUnit) -> None:
    """Refuse a field of all sources that cannot be in ppm.

    Parameters
    ----------
    total_field_ppm
        (voxels,) field inside the mask, finite.
    unit
        The unit it was converted from.

    Raises
    ------
    UnitsError
        If its deviation is too large or too small for a head.
    """
    spread = float(total_field_ppm.std())
    low, high = TOTAL_STD_PPM
    if not low <= spread <= high:
        raise UnitsError(
            f"the total field varies by {spread:.3g} ppm, in a head it is {low:g} to {high:g}: "
            f"check the unit ({unit}), field strength and echo time"
        )


def _advice(p99_ppm: float, unit: FieldUnit, stated: bool) -> str:
    """Return the units that would make a field of a usual size, and how to state one."""
    if unit != "ppm":
        return f"check the unit ({unit}), field strength and echo time"
    low, high = USUAL_P99_PPM
    sizes = {
        other: p99_ppm * ppm_per_unit(other, echo_time_s=TYPICAL_ECHO_S, field_strength_t=TYPICAL_T)
        for other in UNITS
        if other != "ppm"
    }
    fitting = [f"{size:.2g} if it is in {u}" for u, size in sizes.items() if low <= size <= high]
    would = f"it would be {', '.join(fitting)} (at 3 T and 20 ms); " if fitting else ""
    return (
        f"{would}pass --units with the unit that the program which made it states: ppb; hz, rad/s "
        "or tesla with --field-strength; rad with --echo-time too"
        + ("" if stated else "; ppm if it is that, without background")
        + ("; if it is the field of all sources, pass it with --total-field" * (p99_ppm > high))
    )


def require_field(mean_square_ppm2: float) -> None:
    """Refuse a field that cannot be in ppm, by its mean square inside the mask alone.

    Raises
    ------
    DataError
        If it is not finite.
    UnitsError
        If it is zero, or its root exceeds 1 ppm.
    """
    if not math.isfinite(mean_square_ppm2):
        raise DataError("the field holds NaN or Inf inside the mask; fix it or the mask")
    if mean_square_ppm2 == 0:
        raise UnitsError("the field is zero in the whole mask; check the field and the mask")
    if (rms := math.sqrt(mean_square_ppm2)) > STATED_P99_PPM[1]:
        raise UnitsError(
            f"the field's root mean square is {rms:.3g} ppm, too much for tissue (below "
            f"{STATED_P99_PPM[1]:g}): is it in Hz or radians?"
        )


def require_wrapped_phase(phase_rad: NDArray[np.float32]) -> list[str]:
    """Refuse values that cannot be a wrapped phase, and return notes on unlikely ones.

    Parameters
    ----------
    phase_rad
        (voxels,) phase inside the mask, finite.

    Raises
    ------
    UnitsError
        If it exceeds pi, or is too small to be a phase in radians.
    """
    largest = float(np.abs(phase_rad).max(initial=0))
    if largest > math.pi * 1.001:
        raise UnitsError(
            f"the phase reaches {largest:.4g} rad, a wrapped phase at most pi: pass it wrapped "
            "and in radians (not scaled to 4096, not unwrapped)"
        )
    if largest < SMALLEST_WRAPPED_RAD:
        raise UnitsError(
            f"the phase stays within {largest:.2g} rad, too little for a wrapped phase: is the "
            "scaling (scl_slope) in its header stale?"
        )
    if largest >= USUAL_WRAPPED_RAD:
        return []
    return [f"the phase stays within {largest:.2g} rad, a wrapped one usually reaches pi"]
