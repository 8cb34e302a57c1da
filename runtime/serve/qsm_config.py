"""The configuration ``qsm``: the images are the phase and magnitude of several echoes."""

import math
from collections.abc import Generator

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.field_mapping import Echoes, require_echo_memory
from qsm_deploy.runtime.local_field.from_echoes import local_field_from_echoes
from qsm_deploy.runtime.local_field.phase_scale import (
    PhaseScale,
    detect_phase_scale,
    radians_from_phase,
    require_phase_scale,
)
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.serve.acquisition import field_strength_t
from qsm_deploy.runtime.serve.configuration import Request, Source, scan_of
from qsm_deploy.runtime.serve.grouping import EchoVolumes, echo_volumes
from qsm_deploy.runtime.serve.parameters import AUTO, Parameters


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
        phase, scale = _phase_rad(volumes, request.parameters)
        magnitude = _magnitude(volumes, like=phase)
        echoes = Echoes(phase, magnitude, volumes.echo_times_s, strength, geometry.voxel_size_mm)
        del phase, magnitude
    yield f"phase in {scale.name}"
    mask = None if volumes.mask is None else volumes.mask.volume() != 0
    lines = local_field_from_echoes(echoes, mask, geometry, available_bytes(), stages)
    del echoes
    local, inside = yield from lines
    return Source(volumes.phase[0], scan_of(local, inside, volumes.phase[0], "rad", volumes.notes))


def _phase_rad(volumes: EchoVolumes, parameters: Parameters) -> tuple[Volume, PhaseScale]:
    """Return the (n, x, y, z) phase of all echoes [rad], and the scale that it came in."""
    phase = np.stack([stack.volume() for stack in volumes.phase])
    if not np.isfinite(phase).all():
        raise DataError("phase images with NaN or Inf; set these voxels to 0 and send a mask")
    low, high = float(phase.min()), float(phase.max())
    if parameters.phase_scale == AUTO:
        whole = all(stack.is_whole_numbered for stack in volumes.phase)
        scale = detect_phase_scale(low, high, whole_numbers=whole)
    else:
        scale = require_phase_scale(parameters.phase_scale, low, high)
    radians = radians_from_phase(phase, scale)
    return (-radians if parameters.negate else radians), scale


def _magnitude(volumes: EchoVolumes, *, like: Volume) -> Volume:
    """Return the (n, x, y, z) signal of all echoes; 1 where none was sent."""
    if not volumes.magnitude:
        return np.ones_like(like)
    magnitude = np.stack([stack.volume() for stack in volumes.magnitude])
    if not np.isfinite(magnitude).all() or magnitude.min() < 0:
        raise DataError("magnitude images with negative values, NaN or Inf")
    return magnitude
