"""Field maps in ppm, Hz or rad, and how one becomes the other."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError, UnitsError

FieldUnit = Literal["ppm", "hz", "rad"]
PPB_PER_PPM = 1000.0
GYROMAGNETIC_MHZ_PER_T = 42.577  # of the proton, over 2 pi
USUAL_P99_PPM = (0.002, 0.3)
SMALLEST_WRAPPED_RAD = 0.05
USUAL_WRAPPED_RAD = 2.5
LARGEST_P99_PPM = 1.0  # local fields of tissue stay within 0.05 ppm, next to a haemorrhage within 1


def ppm_per_unit(
    unit: FieldUnit, *, echo_time_s: float | None, field_strength_t: float | None
) -> float:
    """Return what one ``unit`` of field is in ppm.

    Parameters
    ----------
    unit
        ``ppm``, ``hz``, or ``rad`` of phase at ``echo_time_s``.
    echo_time_s
        Echo time [s], needed for ``rad``.
    field_strength_t
        Strength of B0 [T], needed for ``hz`` and ``rad``.

    Raises
    ------
    UnitsError
        If a needed value is missing, not positive, or outside what a scanner does.
    """
    if unit == "ppm":
        return 1.0
    if field_strength_t is None:
        raise UnitsError(f"--units {unit} needs the strength of B0: pass --field-strength in tesla")
    if not 0.01 <= field_strength_t <= 30:
        raise UnitsError(
            f"a field strength of {field_strength_t:g} T cannot be right; give it in tesla, for "
            "example 3"
        )
    hertz = 1 / (GYROMAGNETIC_MHZ_PER_T * field_strength_t)
    if unit == "hz":
        return hertz
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


def require_ppm(local_field_ppm: NDArray[np.float32], unit: FieldUnit) -> list[str]:
    """Refuse a field that cannot be in ppm, and return notes on one that is unlikely to be.

    Parameters
    ----------
    local_field_ppm
        (voxels,) field inside the mask, finite.
    unit
        The unit it was converted from.

    Raises
    ------
    UnitsError
        If it is zero everywhere, or its 99th percentile exceeds 1 ppm in absolute value.
    """
    size = np.abs(local_field_ppm)
    if not size.any():
        raise UnitsError("the field is zero in the whole mask; check the field and the mask")
    p99 = float(np.percentile(size, 99))
    if p99 > LARGEST_P99_PPM:
        hint = (
            "looks like Hz: pass --units hz --field-strength 3, or --units rad with --echo-time "
            "for a phase"
            if unit == "ppm"
            else f"check --units {unit}, field strength and echo time"
        )
        raise UnitsError(
            f"the field's 99th percentile is {p99:.3g} ppm, too much for tissue (below "
            f"{LARGEST_P99_PPM:g}): {hint}"
        )
    low, high = USUAL_P99_PPM
    if low <= p99 <= high:
        return []
    return [
        f"the field's 99th percentile is {p99:.2g} ppm, usually it lies between {low:g} and "
        f"{high:g}: check its unit and the scaling in its header"
    ]


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
    if (rms := math.sqrt(mean_square_ppm2)) > LARGEST_P99_PPM:
        raise UnitsError(
            f"the field's root mean square is {rms:.3g} ppm, too much for tissue (below "
            f"{LARGEST_P99_PPM:g}): is it in Hz or radians?"
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
