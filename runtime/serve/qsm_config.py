"""The configuration ``qsm``: the images are the phase and magnitude of several echoes."""

import math
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.echoes import Echoes, require_echo_memory
from qsm_deploy.runtime.local_field.from_echoes import (
    local_field_from_total,
    total_field_from_echoes,
)
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.scan.axes import axes_of
from qsm_deploy.runtime.scan.masks import mask_from_values
from qsm_deploy.runtime.scan.phase_scale import Said, phase_of_echoes
from qsm_deploy.runtime.serve.acquisition import field_strength_t
from qsm_deploy.runtime.serve.configuration import Request, Source, scan_of
from qsm_deploy.runtime.serve.grouping import EchoVolumes, echo_volumes
from qsm_deploy.runtime.serve.parameters import AUTO

VENDOR = "acquisitionSystemInformation/systemVendor"


def source_from_echoes(request: Request, stages: Stages) -> Generator[str, None, Source]:
    """Make a local field of multi-echo phase and magnitude.

    Raises
    ------
    DataError
        If something is missing or contradicts something else.
    UnitsError
        If the scale of the phase cannot be told.
    MemoryLimitError
        If unwrapping would take more memory than there is.
    """
    with stages("group"):
        volumes = echo_volumes(request.images, request.header)
        strength = field_strength_t(request.header)
        geometry = volumes.phase[0].geometry
    times = ", ".join(f"{1000 * t:g}" for t in volumes.echo_times_s)
    yield f"{geometry}; echoes at {times} ms; {strength:.4g} T"
    with stages("phase scale"):
        limit, voxels = available_bytes(), math.prod(geometry.shape)
        require_echo_memory(len(volumes.phase), voxels, limit)
        phase, scales = _phase_rad(volumes, request)
        magnitude = _magnitude(volumes, like=phase)
        echoes = Echoes(phase, magnitude, volumes.echo_times_s, strength, geometry)
        signal = echoes.signal if request.keeps_magnitude and volumes.magnitude else None
        del phase, magnitude
    yield "; ".join(scales)
    mask, notes = None, list(volumes.notes)
    if volumes.mask is not None:
        mask, found = mask_from_values(volumes.mask.volume(), "mask")
        notes += found
    axes = axes_of(volumes.phase[0].affine, geometry)
    echoes = echoes.turned(axes)
    mask = None if mask is None else axes.turn(mask)
    lines = total_field_from_echoes(echoes, mask, limit_bytes=limit, stages=stages, axes=axes)
    del echoes
    total = yield from lines
    local = local_field_from_total(
        total.found,
        total.brain,
        axes.geometry(geometry),
        limit_bytes=limit,
        stages=stages,
    )
    yield "background removed"
    notes += total.notes + local.notes
    noise = total.found.noise_ppm if request.keeps_noise else None
    field, inside = axes.turn_back(local.field_ppm), axes.turn_back(local.mask)
    noise = None if noise is None else axes.turn_back(noise)
    first = volumes.phase[0]
    return Source(first, scan_of(field, inside, first, "ppm", notes, signal, noise))


def _phase_rad(volumes: EchoVolumes, request: Request) -> tuple[NDArray[np.float32], list[str]]:
    """Return the (n, x, y, z) phase of all echoes [rad], and the scales that it came in."""
    phase = [stack.volume() for stack in volumes.phase]
    if not all(np.isfinite(echo).all() for echo in phase):
        raise DataError("phase images with NaN or Inf; set these voxels to 0 and send a mask")
    stated = request.parameters.phase_scale
    vendor = " ".join(request.header.get(VENDOR, []))
    said = Said(None if stated == AUTO else stated, manufacturer=vendor)
    names = [f"the echo at {1000 * time:g} ms" for time in volumes.echo_times_s]
    option = "the parameter phasescale"
    radians, notes = phase_of_echoes(phase, [said] * len(phase), names, option=option)
    return (-radians if request.parameters.negate else radians), notes


def _magnitude(volumes: EchoVolumes, *, like: Volume) -> Volume:
    """Return the (n, x, y, z) signal of all echoes; 1 where none was sent."""
    if not volumes.magnitude:
        return np.ones_like(like)
    magnitude = np.stack([stack.volume() for stack in volumes.magnitude])
    if not np.isfinite(magnitude).all() or magnitude.min() < 0:
        raise DataError("magnitude images with negative values, NaN or Inf")
    return magnitude
