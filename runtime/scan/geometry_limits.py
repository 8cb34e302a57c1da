"""Whether a network may be used on a grid, by what its card says about its training."""

import math

from qsm_deploy.kernels.geometry import Geometry, vector_text
from qsm_deploy.runtime.card.card import GeometryLimits


def deviations(limits: GeometryLimits, geometry: Geometry) -> list[str]:
    """Return how a grid departs from what the network was trained for, one line each.

    Parameters
    ----------
    limits
        Voxel size [mm] with a relative tolerance per axis, B0 direction with one in degrees.
    geometry
        The grid of the volume.
    """
    found = []
    if has_other_voxels(limits, geometry):
        assert limits.voxel_size_mm is not None
        assert limits.voxel_tolerance is not None
        found.append(
            f"voxel size {vector_text(geometry.voxel_size_mm)} mm, the network was trained at "
            f"{vector_text(limits.voxel_size_mm)} mm (+-{100 * limits.voxel_tolerance:.0f} % per "
            "axis)"
        )
    if angle := tilt_deg(limits, geometry):
        assert limits.b0_direction is not None
        found.append(
            f"B0 direction {angle:.1f} degrees off the {vector_text(limits.b0_direction)} of the "
            f"training (at most {limits.b0_tolerance_deg:g}): expected error about "
            f"{error_percent(angle):.0f} % (2 sin {angle:.0f} deg)"
        )
    return found


def has_other_voxels(limits: GeometryLimits, geometry: Geometry) -> bool:
    """Return whether voxels are of another size than those of the training."""
    if limits.voxel_size_mm is None or limits.voxel_tolerance is None:
        return False
    pairs = zip(geometry.voxel_size_mm, limits.voxel_size_mm, strict=True)
    return max(abs(own / trained - 1) for own, trained in pairs) > limits.voxel_tolerance


def tilt_deg(limits: GeometryLimits, geometry: Geometry) -> float:
    """Return by how many degrees B0 is off the training's direction, 0 where that is tolerated."""
    if limits.b0_direction is None or limits.b0_tolerance_deg is None:
        return 0.0
    angle = geometry.b0_angle_deg(limits.b0_direction)
    return angle if angle > limits.b0_tolerance_deg else 0.0


def error_percent(tilt_deg: float) -> float:
    """Return the error of a map whose network ignores a tilt [% of the map], as measured."""
    return 200 * math.sin(math.radians(tilt_deg))
