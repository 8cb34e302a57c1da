"""From the phase and magnitude of a multi-echo GRE in a BIDS dataset to a scan of its local field.

The scale of the phase is told from its sidecar and its range, echo time and field strength are
taken from the sidecars, and nothing of these is guessed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qsm_deploy.kernels.errors import DataError, UnitsError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.bids.layout import BidsImage
from qsm_deploy.runtime.bids.metadata import load_metadata, load_params_of, require_echo
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.field_mapping import Echoes, require_echo_memory
from qsm_deploy.runtime.local_field.from_echoes import EMPTY, local_field_from_echoes, result_of
from qsm_deploy.runtime.local_field.phase_scale import detect_phase_scale, radians_from_phase
from qsm_deploy.runtime.scan.nifti import NiftiVolume, load_on_grid, load_volume
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.scan import Scan, geometry_from
from qsm_deploy.runtime.scan.units import require_ppm

Pair = tuple[BidsImage, BidsImage]


def scan_from_echoes(
    pairs: Sequence[Pair],
    mask_path: Path | None,
    limit_bytes: float,
    stages: Stages,
    *,
    negate: bool,
) -> Scan:
    """Return the local field of a recording.

    Parameters
    ----------
    pairs
        Phase and magnitude, or real and imaginary part, of every echo, in order.
    mask_path
        Where the phase is to be trusted; ``None`` takes what gives signal.
    limit_bytes
        The memory that the steps may take.
    stages
        Takes the time and memory of the steps.
    negate
        Whether the phase falls where the field is higher.

    Raises
    ------
    DataError
        If a file is unreadable or holds NaN, echo time or field strength is missing, or the echoes
        contradict each other.
    GeometryError
        If the volumes lie on different grids.
    UnitsError
        If the scale of the phase cannot be told.
    MemoryLimitError
        If the echoes or their unwrapping would take more memory than that.
    """
    with stages("load"):
        times, strength = _times(pairs)
        first = load_volume(pairs[0][0].path)
        require_echo_memory(len(pairs), first.data.size, limit_bytes)
        others = [load_on_grid(phase.path, first).data for phase, _ in pairs[1:]]
        leading = np.stack([first.data, *others])
        if pairs[0][0].part == "real":
            phase, magnitude = _polar(pairs, leading, first)
            scale = "radians, of real and imaginary parts"
        else:
            phase, scale = _radians(pairs[0][0], leading)
            magnitude = np.stack([_magnitude(image, first) for _, image in pairs])
        mask = None if mask_path is None else _mask(mask_path, first)
    notes = [f"{len(pairs)} echoes, phase in {scale}"]
    params = load_params_of(pairs[0][0])
    geometry = geometry_from(first, Params(), replace(params, echo_time_s=None), notes)
    phase = -phase if negate else phase
    echoes = Echoes(phase, magnitude, times, strength, geometry.voxel_size_mm)
    del phase, magnitude
    lines = local_field_from_echoes(echoes, mask, geometry, limit_bytes, stages)
    del echoes
    local, inside, said = result_of(lines)
    if mask is None:
        notes.append(f"no mask in the dataset: taking the signal, {said[0].split(', ')[1]}")
    notes += require_ppm(local[inside], "rad")
    return Scan(
        np.where(inside, local, np.float32(0))[None],
        inside,
        geometry,
        first.header,
        first.affine,
        field_strength_t=strength,
        notes=notes,
    )


def _times(pairs: Sequence[Pair]) -> tuple[list[float], float]:
    """Return the echo times [s] and the field strength [T], which all images must agree on."""
    stated = [require_echo(phase) for phase, _ in pairs]
    strengths = sorted({strength for _, strength in stated})
    if len(strengths) > 1:
        raise DataError(
            f"{pairs[0][0].path.name}: MagneticFieldStrength is {strengths[0]:g} in one echo and "
            f"{strengths[-1]:g} in another; correct the sidecars"
        )
    for (phase, magnitude), (time, _) in zip(pairs, stated, strict=True):
        other = load_params_of(magnitude).echo_time_s
        if other not in (None, time):
            raise DataError(
                f"{magnitude.path.name}: EchoTime is {other:g}, that of its phase "
                f"{phase.path.name} {time:g}; correct the sidecars"
            )
        if not 1e-4 <= time <= 0.5:
            raise UnitsError(
                f"{phase.path.name}: EchoTime is {time:g}; BIDS wants it in seconds, such as 0.02"
            )
    return [time for time, _ in stated], strengths[0]


def _radians(image: BidsImage, phase: Volume) -> tuple[Volume, str]:
    """Return the (n, x, y, z) phase of all echoes [rad], and the scale that it came in."""
    if bad := int(np.count_nonzero(~np.isfinite(phase))):
        raise DataError(
            f"{image.path.name} and the other echoes: {bad} voxels of the phase are NaN or Inf; "
            "set these voxels to 0"
        )
    low, high = float(phase.min()), float(phase.max())
    whole = bool(np.array_equal(phase, np.rint(phase)))
    units = load_metadata(image).get("Units")
    try:
        scale = detect_phase_scale(low, high, whole_numbers=whole)
    except UnitsError:
        raise UnitsError(
            f"{image.path.name}: the phase of the echoes reaches from {low:.5g} to {high:.5g} "
            f"(Units: {units}), neither a turn in radians nor in 4096 or 8192 steps; check the "
            "scaling (scl_slope) in the header"
        ) from None
    if units not in (None, "arbitrary") and (units != "rad" or whole):
        raise UnitsError(
            f"{image.path.name}: Units are {units!r}, the phase reaches from {low:.5g} to "
            f"{high:.5g}; BIDS knows rad and arbitrary: correct the sidecar"
        )
    return radians_from_phase(phase, scale), scale.name


def _polar(pairs: Sequence[Pair], real: Volume, like: NiftiVolume) -> tuple[Volume, Volume]:
    """Return the (n, x, y, z) phase [rad] and magnitude of real and imaginary parts."""
    imaginary = np.stack([load_on_grid(image.path, like).data for _, image in pairs])
    for (first, second), *parts in zip(pairs, real, imaginary, strict=True):
        for image, values in zip((first, second), parts, strict=True):
            if not np.isfinite(values).all():
                raise DataError(f"{image.path}: the part-{image.part} has NaN or Inf")
        if min(values.min() for values in parts) >= 0:
            raise DataError(
                f"{first.path.name} and {second.path.name} are nowhere negative; real and "
                "imaginary parts lie around 0: check the scaling (scl_inter) in the header"
            )
    return np.arctan2(imaginary, real), np.hypot(real, imaginary)


def _magnitude(image: BidsImage, like: NiftiVolume) -> Volume:
    magnitude = load_on_grid(image.path, like).data
    if not np.isfinite(magnitude).all() or magnitude.min() < 0:
        raise DataError(f"{image.path}: the magnitude has negative values, NaN or Inf")
    return magnitude


def _mask(path: Path, like: NiftiVolume) -> Mask:
    mask: Mask = load_on_grid(path, like).data > 0
    if not mask.any():
        raise DataError(f"{path}: {EMPTY}")
    return mask
