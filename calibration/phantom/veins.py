"""A random tree of cerebral veins."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from qsm_deploy.calibration.phantom.anatomy import CEREBRUM_CENTRE_MM, CEREBRUM_SEMI_AXES_MM
from qsm_deploy.calibration.phantom.head_frame import HeadFrame, ball_coverage
from qsm_deploy.kernels.geometry import Volume

Points = NDArray[np.float64]

STEP_MM = 0.5
RADII_MM = (1.6, 1.1, 0.75, 0.5)  # of trunks, and of every generation of branches
BRANCHES = (3, 3, 3)  # per parent, in every generation
LENGTHS_MM = (30.0, 22.0, 14.0)
CORTICAL_ROOTS = 26
MEDULLARY_ROOTS = 30
# Head coordinates: pericallosal and straight sinus, internal cerebral and basal veins.
MIDLINE_TRUNK_MM = (
    (0, 57, -6), (0, 58, 12), (0, 42, 26), (0, 15, 35), (0, -15, 30), (0, -32, 10), (0, -58, -2),
    (0, -74, -10),
)  # fmt: skip
PAIRED_TRUNKS_MM = (
    ((4, 22, 8), (3, 5, 10), (2, -15, 9), (0, -32, 8)),
    ((14, 20, -22), (14, 5, -18), (15, -10, -10), (8, -24, 0), (0, -32, 6)),
)


@dataclass(frozen=True)
class Branches:
    """Polylines of equal length: points (n, steps, 3) in head coordinates, radius (n) [mm]."""

    points_mm: Points
    radii_mm: NDArray[np.float64]


def draw_veins(frame: HeadFrame, rng: np.random.Generator) -> Volume:
    """Return how much of every voxel is vein, in [0, 1].

    Parameters
    ----------
    frame
        Where to draw; the tree is not cut at the surface of the brain.
    rng
        Decides where the veins run.
    """
    tree = [*_deep_trunks(rng), _cortical_veins(rng), _medullary_veins(rng)]
    generation = tree[:-1]
    for count, length, radius in zip(BRANCHES, LENGTHS_MM, RADII_MM[1:], strict=True):
        generation = [_sprout(parent, count, length, radius, rng) for parent in generation]
        tree += generation
    points = np.concatenate([b.points_mm.reshape(-1, 3) for b in tree])
    radii = np.concatenate([np.repeat(b.radii_mm, b.points_mm.shape[1]) for b in tree])
    return ball_coverage(frame, points.astype(np.float32), radii.astype(np.float32))


def _deep_trunks(rng: np.random.Generator) -> list[Branches]:
    mirrored = [[(-x, y, z) for x, y, z in trunk] for trunk in PAIRED_TRUNKS_MM]
    trunks = []
    for course in (MIDLINE_TRUNK_MM, *PAIRED_TRUNKS_MM, *mirrored):
        via = np.array(course, dtype=float) + rng.normal(0, 1.0, (len(course), 3))
        length = np.linalg.norm(np.diff(via, axis=0), axis=1).sum()
        at = np.linspace(0, len(course) - 1, int(length / STEP_MM))
        points = make_interp_spline(np.arange(len(course)), via, k=3)(at)
        radius = RADII_MM[0] if course is MIDLINE_TRUNK_MM else RADII_MM[1]
        trunks.append(Branches(points[None], np.array([radius])))
    return trunks


def _cortical_veins(rng: np.random.Generator) -> Branches:
    """Start near the midline of the upper surface and run down along it."""
    n = CORTICAL_ROOTS
    side = rng.choice((-1.0, 1.0), n)
    front = rng.uniform(-0.9, 0.9, n)
    on_sphere = np.stack([0.1 * side, front, np.sqrt(0.99 - front**2)], axis=1)
    heading = np.stack([side, rng.normal(0, 0.5, n), rng.normal(0, 0.2, n)], axis=1)
    radii = rng.uniform(RADII_MM[2], RADII_MM[0], n)
    return _grow(_from_sphere(0.95 * on_sphere), heading, 70.0, radii, rng, along_surface=True)


def _medullary_veins(rng: np.random.Generator) -> Branches:
    """Start at the walls of the ventricles and run outwards through white matter."""
    n = MEDULLARY_ROOTS
    side = rng.choice((-1.0, 1.0), n)
    start = np.stack([15 * side, rng.uniform(-30, 45, n), rng.uniform(12, 22, n)], axis=1)
    heading = np.stack([side, rng.normal(0, 0.4, n), rng.uniform(0, 1.0, n)], axis=1)
    return _grow(start, heading, 25.0, np.full(n, RADII_MM[3]), rng)


def _sprout(
    parent: Branches, count: int, length_mm: float, radius_mm: float, rng: np.random.Generator
) -> Branches:
    """Grow ``count`` thinner branches from random points of every parent."""
    number, steps, _ = parent.points_mm.shape
    which = np.repeat(np.arange(number), count)
    at = rng.integers(1, steps, which.size)
    start = parent.points_mm[which, at]
    along = start - parent.points_mm[which, at - 1]
    heading = along / STEP_MM + rng.normal(0, 0.7, along.shape)
    radii = np.minimum(parent.radii_mm[which], radius_mm * rng.uniform(0.8, 1.2, which.size))
    return _grow(start, heading, length_mm, np.maximum(radii, RADII_MM[3]), rng)


def _grow(
    start_mm: Points,
    heading: Points,
    length_mm: float,
    radii_mm: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    along_surface: bool = False,
) -> Branches:
    """Walk from every start with a slowly turning heading, optionally on the brain's surface."""
    points = [start_mm]
    for _ in range(int(length_mm / STEP_MM)):
        heading = heading + rng.normal(0, 0.12, heading.shape)
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        ahead = points[-1] + STEP_MM * heading
        if along_surface:
            on_sphere = (ahead - CEREBRUM_CENTRE_MM) / CEREBRUM_SEMI_AXES_MM
            on_sphere *= 0.95 / np.linalg.norm(on_sphere, axis=1, keepdims=True)
            ahead = _from_sphere(on_sphere)
            heading = (ahead - points[-1]) / STEP_MM
        points.append(ahead)
    return Branches(np.stack(points, axis=1), radii_mm)


def _from_sphere(points: Points) -> Points:
    """Map the unit ball to the cerebrum."""
    return points * CEREBRUM_SEMI_AXES_MM + CEREBRUM_CENTRE_MM
