"""A multi-echo gradient echo: its phase and magnitude, and the memory that they take."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qsm_deploy.kernels.errors import DataError, MemoryLimitError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.scan.axes import Axes
from qsm_deploy.runtime.scan.units import ppm_per_unit

READ = 16  # bytes per voxel of an echo: phase and signal, as read and stacked


@dataclass(frozen=True)
class Echoes:
    """A multi-echo gradient echo.

    Attributes
    ----------
    phase_rad, magnitude
        (n, x, y, z) float32, wrapped phase and signal of each echo.
    echo_times_s
        Of each echo, rising.
    field_strength_t
        Of B0.
    geometry
        The grid.

    Raises
    ------
    DataError
        If the echo times do not rise.
    UnitsError
        If a time or the field strength is none of a scanner.
    """

    phase_rad: Volume
    magnitude: Volume
    echo_times_s: Sequence[float]
    field_strength_t: float
    geometry: Geometry

    def __post_init__(self) -> None:
        times = list(self.echo_times_s)
        for time in times:
            ppm_per_unit("rad", echo_time_s=time, field_strength_t=self.field_strength_t)
        if any(later <= earlier for earlier, later in itertools.pairwise(times)):
            raise DataError(f"echo times of {[round(1e3 * t, 3) for t in times]} ms do not rise")

    def turned(self, axes: Axes) -> "Echoes":
        """Return the echoes in axes that are made of theirs."""
        return replace(
            self,
            phase_rad=axes.turn(self.phase_rad),
            magnitude=axes.turn(self.magnitude),
            geometry=axes.geometry(self.geometry),
        )

    @property
    def signal(self) -> Volume:
        """(x, y, z) magnitude of all echoes together."""
        signal: Volume = np.sqrt(np.einsum("n...,n...", self.magnitude, self.magnitude))
        return signal


def require_echo_memory(count: int, voxels: int, limit_bytes: float) -> None:
    """Refuse more echoes than the memory holds.

    Raises
    ------
    MemoryLimitError
        If it does not.
    """
    needed = READ * count * voxels
    if needed > limit_bytes:
        raise MemoryLimitError(
            f"{count} echoes would take {memory_text(needed)}, {memory_text(limit_bytes)} are "
            "left; give fewer"
        )
