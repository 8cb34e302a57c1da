"""How brightly tissues shine in a gradient echo, and how fast they fade."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.head_frame import ADULT_FOV_MM, HeadFrame, smooth_noise
from qsm_deploy.kernels.geometry import Geometry, Volume

# M0 relative to water, and R2* at 3 T [1/s]; what lies outside the head is air
TISSUES = {
    Label.OUTSIDE: (0.0, 0.0),
    Label.CAUDATE: (0.75, 25.0),
    Label.GLOBUS_PALLIDUS: (0.68, 40.0),
    Label.PUTAMEN: (0.74, 28.0),
    Label.RED_NUCLEUS: (0.68, 36.0),
    Label.DENTATE: (0.70, 34.0),
    Label.SUBSTANTIA_NIGRA: (0.68, 38.0),
    Label.THALAMUS: (0.72, 22.0),
    Label.WHITE_MATTER: (0.65, 21.0),
    Label.GREY_MATTER: (0.78, 18.0),
    Label.CSF: (0.90, 5.0),
    Label.VEIN: (0.75, 40.0),
    Label.FAT: (0.0, 0.0),  # saturated
    Label.BONE: (0.12, 300.0),
    Label.AIR: (0.0, 0.0),
    Label.MUSCLE: (0.70, 30.0),
    Label.CALCIFICATION: (0.30, 120.0),
    Label.MICROBLEED: (0.60, 120.0),
    Label.HAEMORRHAGE: (0.70, 80.0),
}
TEXTURE_MM, TEXTURE = 3.0, 0.05  # band limit, and standard deviation relative to M0
POINT_SPREAD_VOXELS = 0.45
DARKEST = 0.1  # of the coil's sensitivity


class Contrast(NamedTuple):
    """What the signal of a gradient echo is made of.

    Attributes
    ----------
    m0
        (x, y, z) signal at no echo time, as the coil receives it; about 1.
    r2_star_3t
        (x, y, z) decay at 3 T [1/s].
    """

    m0: Volume
    r2_star_3t: Volume


def draw_contrast(
    labels: NDArray[np.uint8], geometry: Geometry, rng: np.random.Generator
) -> Contrast:
    """Return the contrast of tissues, with texture and the bias of the receive coil.

    Parameters
    ----------
    labels
        (x, y, z) values of :class:`Label`; 0 gives no signal.
    geometry
        The grid.
    rng
        Draws the texture.
    """
    table = np.zeros((2, max(Label) + 1), dtype=np.float32)
    table[:, list(TISSUES)] = np.transpose(list(TISSUES.values()))
    m0, r2_star = (gaussian_filter(row[labels], POINT_SPREAD_VOXELS, truncate=3) for row in table)
    axes = HeadFrame(geometry).axes
    m0 *= 1 + TEXTURE * smooth_noise(axes, TEXTURE_MM, ADULT_FOV_MM / 2, rng)
    squared = sum(axis * axis for axis in np.ix_(*(axis / 100 for axis in axes)))
    m0 *= np.maximum(1.15 - 0.5 * squared, DARKEST)
    return Contrast(m0, r2_star)
