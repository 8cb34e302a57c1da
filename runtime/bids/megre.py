"""From the phase and magnitude of a multi-echo GRE in a BIDS dataset to a scan of its local field.

The scale of the phase is told from its sidecar and its range, echo time and field strength are
taken from the sidecars, and nothing of these is guessed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError, UnitsError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.bids.layout import BidsImage
from qsm_deploy.runtime.bids.metadata import load_metadata, load_params_of, require_echo
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.complex_parts import require_parts_of_one
from qsm_deploy.runtime.local_field.echoes import Echoes, require_echo_memory
from qsm_deploy.runtime.local_field.from_echoes import (
    local_field_from_total,
    result_of,
    total_field_from_echoes,
)
from qsm_deploy.runtime.scan.axes import axes_of
from qsm_deploy.runtime.scan.nifti import NiftiVolume, load_on_grid, load_volume
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.phase_scale import Said, is_vague, phase_of_echoes
from qsm_deploy.runtime.scan.scan import Scan, geometry_from, mask_of_file
from qsm_deploy.runtime.scan.units import require_ppm

Pair = tuple[BidsImage, BidsImage]


def scan_from_echoes(
    pairs: Sequence[Pair],
    mask_path: Path | None,
    limit_bytes: float,
    stages: Stages,
    *,
    negate: bool,
    phase_scale: str | None = None,
    keeps_magnitude: bool = False,
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
    phase_scale
        What the values of all phases mean; ``None`` tells it of each.
    keeps_magnitude
        Whether the scan has the magnitude of all echoes.

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
        phases = [first, *(load_on_grid(phase.path, first) for phase, _ in pairs[1:])]
        if pairs[0][0].part == "real":
            phase, magnitude = _polar(pairs, phases)
            scales = ["phase in radians, of real and imaginary parts"]
        else:
            phase, scales = _radians([image for image, _ in pairs], phases, phase_scale)
            magnitude = np.stack([_magnitude(image, first) for _, image in pairs])
        notes = [f"{len(pairs)} echoes, {'; '.join(scales)}"]
        notes += [note for volume in phases[1:] for note in volume.notes]
        mask = None if mask_path is None else mask_of_file(mask_path, first, notes)
        del phases
    params = load_params_of(pairs[0][0])
    geometry, b0_from = geometry_from(first, Params(), replace(params, echo_time_s=None), notes)
    phase = -phase if negate else phase
    echoes = Echoes(phase, magnitude, times, strength, geometry)
    signal = echoes.signal if keeps_magnitude else None
    del phase, magnitude
    axes = axes_of(first.directed_affine, geometry)
    echoes, mask = echoes.turned(axes), None if mask is None else axes.turn(mask)
    lines = total_field_from_echoes(echoes, mask, limit_bytes=limit_bytes, stages=stages, axes=axes)
    del echoes
    total = result_of(lines)
    grid = axes.geometry(geometry)
    local = local_field_from_total(total.found, total.brain, grid, stages=stages)
    inside = local.mask
    notes += total.notes + local.notes + require_ppm(local.field_ppm[inside], "ppm")
    affine = first.directed_affine
    return Scan(
        local.field_ppm[None],
        inside,
        grid,
        first.header,
        None if affine is None else axes.affine(affine, geometry.shape),
        field_strength_t=strength,
        magnitude=None if signal is None else axes.turn(signal) * inside,
        axes=axes,
        b0_from=b0_from,
        notes=notes,
    )


def _times(pairs: Sequence[Pair]) -> tuple[list[float], float]:
    """Return the echo times [s] and the field strength [T], which all images must agree on."""
    stated = [require_echo(phase) for phase, _ in pairs]
    strengths = sorted({strength for _, strength in stated})
    if strengths[-1] > 1.001 * strengths[0]:
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


def _radians(
    images: Sequence[BidsImage], volumes: Sequence[NiftiVolume], stated: str | None
) -> tuple[NDArray[np.float32], list[str]]:
    """Return the (n, x, y, z) phase of all echoes [rad], and the scales that it came in."""
    said = []
    for image, volume in zip(images, volumes, strict=True):
        if bad := int(np.count_nonzero(~np.isfinite(volume.data))):
            raise DataError(
                f"{image.path.name}: {bad} voxels of the phase are NaN or Inf; set these voxels "
                "to 0"
            )
        metadata = load_metadata(image)
        stated_units = [str(metadata.get(name, "")) for name in ("Units", "RescaleType")]
        units = next((unit for unit in stated_units if not is_vague(unit)), None)
        slope, intercept = volume.scaling
        said.append(Said(stated, units, slope, intercept, str(metadata.get("Manufacturer", ""))))
    names = [image.path.name for image in images]
    return phase_of_echoes([volume.data for volume in volumes], said, names)


def _polar(pairs: Sequence[Pair], volumes: Sequence[NiftiVolume]) -> tuple[Volume, Volume]:
    """Return the (n, x, y, z) phase [rad] and magnitude of real and imaginary parts."""
    real = np.stack([volume.data for volume in volumes])
    imaginary = np.stack([load_on_grid(image.path, volumes[0]).data for _, image in pairs])
    for (first, second), *parts in zip(pairs, real, imaginary, strict=True):
        for image, values in zip((first, second), parts, strict=True):
            if not np.isfinite(values).all():
                raise DataError(f"{image.path}: the part-{image.part} has NaN or Inf")
        require_parts_of_one((first.path.name, second.path.name), parts)
    return np.arctan2(imaginary, real), np.hypot(real, imaginary)


def _magnitude(image: BidsImage, like: NiftiVolume) -> Volume:
    magnitude = load_on_grid(image.path, like).data
    if not np.isfinite(magnitude).all() or magnitude.min() < 0:
        raise DataError(f"{image.path}: the magnitude has negative values, NaN or Inf")
    return magnitude
