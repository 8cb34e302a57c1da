"""Whether a network may be used on a grid, by what its card says about its training."""

from qsm_deploy.kernels.errors import GeometryError
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
    expected, tolerance = limits.voxel_size_mm, limits.voxel_tolerance
    if expected is not None and tolerance is not None:
        off = max(abs(v / e - 1) for v, e in zip(geometry.voxel_size_mm, expected, strict=True))
        if off > tolerance:
            found.append(
                f"voxel size {vector_text(geometry.voxel_size_mm)} mm, the network was trained at "
                f"{vector_text(expected)} mm (+-{100 * tolerance:.0f} % per axis)"
            )
    if limits.b0_direction is not None and limits.b0_tolerance_deg is not None:
        angle = geometry.b0_angle_deg(limits.b0_direction)
        if angle > limits.b0_tolerance_deg:
            found.append(
                f"B0 direction {vector_text(geometry.b0_direction)}, {angle:.1f} degrees off the "
                f"{vector_text(limits.b0_direction)} of the training "
                f"(at most {limits.b0_tolerance_deg:g})"
            )
    return found


def require_geometry(limits: GeometryLimits, geometry: Geometry) -> None:
    """Refuse a grid that the network was not trained for.

    Raises
    ------
    GeometryError
        If there are :func:`deviations`; the message names all of them.
    """
    if found := deviations(limits, geometry):
        raise GeometryError(
            f"{'; '.join(found)}; pass --resample if it is the voxel size, use a network for any "
            "geometry such as tkd-unet, or pass --allow-geometry"
        )
