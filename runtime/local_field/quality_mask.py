"""Where in the brain a field may be believed, and where its background may be sought."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import (
    binary_erosion,
    binary_fill_holes,
    binary_opening,
    distance_transform_edt,
    label,
)

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Mask
from qsm_deploy.runtime.local_field.field_mapping import MOST_MISFIT, MOST_NOISE_PPM, FieldMap


@dataclass(frozen=True)
class Quality:
    """How much is asked of a voxel.

    Attributes
    ----------
    erosion_mm
        That the mask loses at its edge, where voxels hold some bone; at least one voxel.
    most_misfit, most_noise_ppm
        Of a voxel that is trusted.
    noisy
        Noise this much above the median alone counts: a short echo is noisy everywhere.
    """

    erosion_mm: float = 2.0
    most_misfit: float = MOST_MISFIT
    most_noise_ppm: float = MOST_NOISE_PPM
    noisy: float = 5.0


QUALITY = Quality()


def quality_mask(
    mask: Mask, found: FieldMap, geometry: Geometry, quality: Quality = QUALITY
) -> tuple[Mask, Mask]:
    """Return where the local field is wanted, and where the total field is trusted.

    Parameters
    ----------
    mask
        (x, y, z) bool, the brain.
    found
        Its field.
    geometry
        The grid.
    quality
        What is asked.

    Returns
    -------
    (x, y, z) bool arrays
        One connected part, its holes filled, since lesions are ones; what of it is trusted.

    Raises
    ------
    DataError
        If nothing is left.
    """
    inside = eroded(mask, geometry, quality.erosion_mm)
    trusted = inside
    misfit, noise = found.misfit, found.noise_ppm
    if noise is not None and misfit is not None and inside.any():
        usual = quality.noisy * float(np.median(noise[inside]))
        most_ppm = max(quality.most_noise_ppm, usual)
        trusted = inside & (misfit <= quality.most_misfit) & (noise <= most_ppm)
    kept = largest_part(binary_opening(trusted)) & inside
    if not kept.any():
        raise DataError(
            f"nothing is left of the mask {quality.erosion_mm:g} mm below its edge where the field "
            "is good; pass a larger mask, or erode it less"
        )
    return kept, kept & trusted


def eroded(mask: Mask, geometry: Geometry, radius_mm: float) -> Mask:
    """Return the voxels deeper than a radius below a mask's edge, and one voxel at least."""
    if radius_mm <= 0:
        return mask
    framed = np.pad(mask, 1)  # beyond the volume nothing was measured
    deep = distance_transform_edt(framed, sampling=geometry.voxel_size_mm) > radius_mm
    inner: Mask = (deep & binary_erosion(framed))[1:-1, 1:-1, 1:-1]
    return inner


def largest_part(mask: Mask) -> Mask:
    """Return the largest connected part of a mask, its holes filled."""
    parts, count = label(mask)
    if count == 0:
        return np.zeros_like(mask)
    sizes = np.bincount(parts.ravel())
    filled: Mask = binary_fill_holes(parts == 1 + int(np.argmax(sizes[1:])))
    return filled
