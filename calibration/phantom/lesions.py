"""Lesions with strong susceptibility: calcification, microbleeds, haemorrhage."""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom.anatomy import Anatomy, Label
from qsm_deploy.calibration.phantom.head_frame import HeadFrame, ball_coverage
from qsm_deploy.kernels.geometry import Volume

SMALLEST_DEPTH_MM = 8.0
MICROBLEEDS = (4, 10)  # fewest and most


def draw_lesions(
    frame: HeadFrame, anatomy: Anatomy, rng: np.random.Generator
) -> list[tuple[Label, Volume]]:
    """Return each kind of lesion with how much of every voxel it covers, in [0, 1].

    Parameters
    ----------
    frame
        Where to draw.
    anatomy
        The head; every lesion is centred on a voxel well below its surface.
    rng
        Decides number, places and sizes.
    """
    deep = np.flatnonzero(anatomy.depth_mm > SMALLEST_DEPTH_MM)

    def places(count: int) -> NDArray[np.float32]:
        chosen = deep[(rng.random(count) * deep.size).astype(int)]
        index = np.unravel_index(chosen, anatomy.depth_mm.shape)
        return np.stack([axis[i] for axis, i in zip(frame.axes, index, strict=True)], axis=1)

    def clump(radius_mm: float, balls: int) -> Volume:
        spread = rng.normal(0, 0.5 * radius_mm, (balls, 3)).astype(np.float32)
        spread[0] = 0
        radii = rng.uniform(0.6, 1.0, balls).astype(np.float32) * radius_mm
        return ball_coverage(frame, places(1) + spread, radii)

    haemorrhage = clump(rng.uniform(4.0, 8.0), 8)
    count = int(rng.integers(*MICROBLEEDS, endpoint=True))
    microbleeds = ball_coverage(
        frame, places(count), rng.uniform(0.8, 2.2, count).astype(np.float32)
    )
    calcification = clump(rng.uniform(1.2, 2.5), 3)
    return [
        (Label.HAEMORRHAGE, haemorrhage),
        (Label.MICROBLEED, microbleeds),
        (Label.CALCIFICATION, calcification),
    ]
