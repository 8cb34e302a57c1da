"""What lies around the brain, and the background field that it makes there."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

from qsm_deploy.calibration.phantom.anatomy import Label, by_label
from qsm_deploy.calibration.phantom.head_frame import HeadFrame, ellipsoid_radius
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry, Mask, Shape, Volume

# Marques et al., Magn Reson Med 86:526-542 (2021)
CHI_PPM = {Label.FAT: 0.019, Label.BONE: -2.1, Label.AIR: 9.2, Label.MUSCLE: 0.0}
SKULL_MM, SKIN_MM = 5.0, 11.0  # where they end, from the brain
# Head coordinates: the outline of face and neck in (x, y), and where they begin.
FACE_CENTRE_MM, FACE_SEMI_AXES_MM, FACE_TOP_MM = (0.0, 6.0, 0.0), (60.0, 84.0, np.inf), -30.0
WALL_MM = 2.0  # of bone between brain and air
# Head coordinates, centre and semi-axes: sphenoid sinus and nose, frontal sinus, mastoid cells.
CAVITIES_MM = (
    ((0, 46, -44), (13, 22, 14)),
    ((0, 84, -18), (15, 6, 9)),
    ((50, -10, -42), (8, 10, 10)),
    ((-50, -10, -42), (8, 10, 10)),
)
POINT_SPREAD_VOXELS = 0.8
SHIMMED = 0.92  # of what shims of the second order could take


def draw_surroundings(mask: Mask, geometry: Geometry) -> NDArray[np.uint8]:
    """Return what lies around a brain: skull, skin, face and neck, air and its cavities.

    Parameters
    ----------
    mask
        (x, y, z) bool, True in the brain.
    geometry
        The grid.

    Returns
    -------
    (x, y, z) uint8 array
        ``BONE``, ``AIR`` and ``MUSCLE`` of :class:`Label`, 0 in the brain.
    """
    frame = HeadFrame(geometry)
    from_brain_mm = distance_transform_edt(~mask, sampling=frame.voxel_mm)
    face = ellipsoid_radius(frame.axes, FACE_CENTRE_MM, FACE_SEMI_AXES_MM) < 1
    face &= frame.axes[2] < FACE_TOP_MM
    labels = np.where((from_brain_mm < SKIN_MM) | face, Label.MUSCLE, Label.AIR).astype(np.uint8)
    labels[from_brain_mm < SKULL_MM] = Label.BONE
    for centre_mm, semi_axes_mm in CAVITIES_MM:
        cavity = ellipsoid_radius(frame.axes, centre_mm, semi_axes_mm) < 1
        labels[cavity & (from_brain_mm > WALL_MM)] = Label.AIR
    labels[mask] = Label.OUTSIDE
    return labels


def background_field(surroundings: NDArray[np.uint8], geometry: Geometry) -> Volume:
    """Return the field that what lies around the brain makes, shimmed up to the second order.

    The lowest slice goes on below the grid, as the neck does.

    Parameters
    ----------
    surroundings
        (x, y, z) labels as of :func:`draw_surroundings`.
    geometry
        The grid.

    Returns
    -------
    (x, y, z) float32 array
        Field [ppm] on the whole grid; its sources lie outside the brain.
    """
    mask = surroundings == Label.OUTSIDE
    chi = by_label(CHI_PPM)
    chi -= chi[Label.AIR]  # nothing is where nothing is said
    sources = gaussian_filter(chi[surroundings], POINT_SPREAD_VOXELS)
    sources[mask] = chi[Label.OUTSIDE]
    x, y, z = (n // 2 for n in geometry.shape)
    field = field_with_neck(sources, geometry, neck_voxels=z, pad_voxels=(x, y, z))
    return field - shim(field, mask, geometry)


def field_with_neck(
    chi_ppm: Volume, geometry: Geometry, *, neck_voxels: int, pad_voxels: Shape
) -> Volume:
    """Return the (x, y, z) field [ppm] of a head, the lowest slice of which goes on below.

    Parameters
    ----------
    chi_ppm
        (x, y, z) susceptibility, that of air 0.
    geometry
        The grid.
    neck_voxels
        How far it goes on.
    pad_voxels
        Of air, on both sides of each axis.
    """
    longer = np.pad(chi_ppm, ((0, 0), (0, 0), (neck_voxels, 0)), mode="edge")
    x, y, z = longer.shape
    grid = Geometry((x, y, z), geometry.voxel_size_mm, geometry.b0_direction)
    return dipole_convolve(longer, grid, pad_voxels=pad_voxels)[..., neck_voxels:]


def shim(field_ppm: Volume, mask: Mask, geometry: Geometry) -> Volume:
    """Return what a scanner's shims take of an (x, y, z) field [ppm].

    It is most of the harmonic polynomial of the second order that is closest in the mask.
    """
    x, y, z = np.ix_(*(axis / 100 for axis in HeadFrame(geometry).axes))
    one = np.ones(geometry.shape, dtype=np.float32)
    terms = (1, x, y, z, x * y, x * z, y * z, x * x - y * y, 2 * z * z - x * x - y * y)
    inside: NDArray[np.float32] = np.stack([(term * one)[mask] for term in terms], axis=1)
    weights = np.linalg.lstsq(inside, field_ppm[mask], rcond=None)[0]
    fit: Volume = sum(weight * term for weight, term in zip(weights, terms, strict=True)) * one
    return np.float32(SHIMMED) * fit
