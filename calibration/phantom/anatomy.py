"""The anatomy of a procedural head: which tissue every voxel is.

Positions are head coordinates (see :class:`HeadFrame`), close to those of a stereotaxic atlas
whose origin is moved to the centre of the field of view: +x right, +y front, +z up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from qsm_deploy.calibration.phantom.head_frame import (
    ADULT_FOV_MM,
    HeadFrame,
    ellipsoid_radius,
    smooth_noise,
)
from qsm_deploy.kernels.geometry import Volume


class Label(IntEnum):
    """Tissue labels of the 2019 QSM challenge phantom; 17 and 18 are added here.

    Fat, bone, air and muscle lie outside the brain.
    """

    OUTSIDE = 0
    CAUDATE = 1
    GLOBUS_PALLIDUS = 2
    PUTAMEN = 3
    RED_NUCLEUS = 4
    DENTATE = 5
    SUBSTANTIA_NIGRA = 6
    THALAMUS = 7
    WHITE_MATTER = 8
    GREY_MATTER = 9
    CSF = 10
    VEIN = 11
    FAT = 12
    BONE = 13
    AIR = 14
    MUSCLE = 15
    CALCIFICATION = 16
    MICROBLEED = 17
    HAEMORRHAGE = 18


def by_label(values: Mapping[Label, float]) -> NDArray[np.float32]:
    """Return a table that labels index, 0 where there is no value for one."""
    table = np.zeros(max(Label) + 1, dtype=np.float32)
    table[list(values)] = list(values.values())
    return table


@dataclass(frozen=True)
class Anatomy:
    """Tissue labels (x, y, z), 0 outside the brain, and the depth below its surface [mm]."""

    labels: NDArray[np.uint8]
    depth_mm: Volume


class Region(NamedTuple):
    """An ellipsoid of one tissue; off the midline it has a mirror image."""

    label: Label
    centre_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    yaw_deg: float = 0.0
    pitch_deg: float = 0.0


# Later ones cover earlier ones.
REGIONS = (
    Region(Label.CSF, (8.5, 36, 7), (3.5, 12, 7), 10),
    Region(Label.CSF, (9.5, 9, 17), (5, 22, 5.5), 0, -8),
    Region(Label.CSF, (25, -31, 4), (5.5, 20, 7), 12),
    Region(Label.THALAMUS, (12, -1, 1), (8.5, 14, 8.5), 25),
    Region(Label.CSF, (0, 3, -4), (2.2, 13, 9)),
    Region(Label.CSF, (0, -27, -37), (7, 5, 9)),
    Region(Label.CAUDATE, (13, 31, 3), (5, 9, 8), -10),
    Region(Label.CAUDATE, (16.5, 12, 15), (3.2, 15, 4), 0, -20),
    Region(Label.PUTAMEN, (26.5, 19, -4), (5.2, 15, 10), 10),
    Region(Label.GLOBUS_PALLIDUS, (19, 13, -6), (4.2, 9, 6), 28),
    Region(Label.SUBSTANTIA_NIGRA, (10.5, 0, -19), (2.6, 7, 4), 35),
    Region(Label.RED_NUCLEUS, (5, -3, -16), (3, 3.2, 4)),
    Region(Label.DENTATE, (16, -38, -40), (4.5, 8, 5), -20),
)

CEREBRUM_CENTRE_MM = (0.0, 0.0, 13.0)
CEREBRUM_SEMI_AXES_MM = (66.0, 84.0, 57.0)
CEREBELLUM_CENTRE_MM = (0.0, -44.0, -38.0)
CEREBELLUM_SEMI_AXES_MM = (50.0, 30.0, 25.0)
CORTEX_MM = 2.8
SULCUS_MM = 0.6  # half the width of the fluid between two banks
SULCUS_SPACING_MM = 4.2  # of the noise whose zeros are the sulci: about 11 mm from one to the next
SULCUS_DEPTH_MM = 17.0
FOLIA_MM = 5.0


def draw_anatomy(frame: HeadFrame, rng: np.random.Generator) -> Anatomy:
    """Draw the tissues of one head, without vessels and lesions.

    Parameters
    ----------
    frame
        Where to draw.
    rng
        Decides folding, outline, and the place, size and rotation of the nuclei.
    """
    half = ADULT_FOV_MM / 2
    outline = 1.5 * smooth_noise(frame.axes, 20.0, half, rng)
    cerebrum = _cerebrum_depth(frame) + outline
    cerebellum = _depth(frame, CEREBELLUM_CENTRE_MM, CEREBELLUM_SEMI_AXES_MM) + outline
    stem = _depth(frame, (0.0, -10.0, -43.0), (14.0, 13.0, 32.0)) + outline

    labels = np.zeros(frame.geometry.shape, dtype=np.uint8)
    _paint_ribbon(labels, cerebellum > 0, _folia(frame, cerebellum, outline))
    _paint_ribbon(labels, cerebrum > 0, _cortical_ribbon(frame, cerebrum, rng))
    labels[(stem > 0) & (cerebellum < 6)] = Label.WHITE_MATTER
    edge = smooth_noise(frame.axes, 6.0, half, rng)
    for region in REGIONS:
        for side in (1, -1) if region.centre_mm[0] else (1,):
            _paint_region(labels, frame, region, side, edge, rng)
    return Anatomy(labels, np.maximum(np.maximum(cerebrum, cerebellum), stem))


def _depth(
    frame: HeadFrame, centre_mm: tuple[float, ...], semi_axes_mm: tuple[float, ...]
) -> Volume:
    """Return the depth below an ellipsoid's surface [mm], negative outside; exact near it."""
    radius = ellipsoid_radius(frame.axes, centre_mm, semi_axes_mm)
    # |grad radius| = |p / a^2| / radius: the radius of the ellipsoid with the squared semi-axes
    slope = ellipsoid_radius(frame.axes, centre_mm, np.square(semi_axes_mm))
    tiny = np.float32(1e-6)
    per_mm: Volume = np.maximum(slope, tiny / 50)
    outwards: Volume = np.maximum(radius, tiny)
    depth: Volume = (1 - radius) * outwards / per_mm
    return depth


def _cerebrum_depth(frame: HeadFrame) -> Volume:
    """Return the depth in an ellipsoid with a flat base that rises under the frontal lobes."""
    _, y, z = np.ix_(*frame.axes)
    base = z + 38 - 14 / (1 + np.exp(-(y - 25) / 4))
    depth: Volume = np.minimum(_depth(frame, CEREBRUM_CENTRE_MM, CEREBRUM_SEMI_AXES_MM), base)
    return depth


def _cortical_ribbon(frame: HeadFrame, depth_mm: Volume, rng: np.random.Generator) -> Volume:
    """Return the distance to the nearest cerebral fluid: surface, sulci, or the fissure [mm]."""
    x, _, _ = np.ix_(*frame.axes)
    half = ADULT_FOV_MM / 2
    wave = smooth_noise(frame.axes, 16.0, half, rng)
    callosum = ellipsoid_radius(frame.axes, (0, 2, 2), (22, 46, 28))
    fissure = np.abs(x + wave) + 40 * np.maximum(0, 1 - callosum)

    folding = _radial_noise(frame, SULCUS_SPACING_MM, rng)
    slopes = np.gradient(folding, *frame.voxel_mm.astype(np.float32))
    sulci = np.abs(folding) / np.sqrt(sum(s * s for s in slopes) + np.float32(1e-4))
    sulci += np.maximum(0, depth_mm - SULCUS_DEPTH_MM - 4 * wave)
    banks = np.minimum(sulci, fissure) - SULCUS_MM
    ribbon: Volume = np.minimum(depth_mm, banks)
    return ribbon


def _radial_noise(frame: HeadFrame, spacing_mm: float, rng: np.random.Generator) -> Volume:
    """Return noise that varies along the surface more than with depth, as sulci do."""
    half = ADULT_FOV_MM / 2
    lattice_axes = [np.arange(-h, h + 1, 2.0, dtype=np.float32) for h in half]
    lattice = smooth_noise(lattice_axes, spacing_mm, half, rng)
    radius = ellipsoid_radius(frame.axes, CEREBRUM_CENTRE_MM, CEREBRUM_SEMI_AXES_MM)
    outward = np.maximum(radius, 0.3) ** np.float32(-0.6)
    centred = np.ix_(*frame.axes)
    index = np.stack(
        [
            np.clip(p * outward + c * (1 - outward), -h, h) / 2 + h / 2
            for p, c, h in zip(centred, CEREBRUM_CENTRE_MM, half.astype("f4"), strict=True)
        ]
    )
    noise: Volume = map_coordinates(lattice, index, order=1)
    return noise


def _folia(frame: HeadFrame, depth_mm: Volume, wave: Volume) -> Volume:
    """Return the distance to the nearest fluid of the cerebellum, leaves around its hilum [mm]."""
    hilum = ellipsoid_radius(frame.axes, (0, -24, -36), (1, 1, 1))
    leaves = np.abs((hilum + 2 * wave) % FOLIA_MM - FOLIA_MM / 2) + 1
    leaves += np.maximum(0, depth_mm - 13)
    folia: Volume = np.minimum(depth_mm, leaves)
    return folia


def _paint_ribbon(
    labels: NDArray[np.uint8], inside: NDArray[np.bool_], distance_to_fluid_mm: Volume
) -> None:
    tissue = np.where(distance_to_fluid_mm < CORTEX_MM, Label.GREY_MATTER, Label.WHITE_MATTER)
    tissue[distance_to_fluid_mm < 0] = Label.CSF
    labels[inside] = tissue[inside]


def _paint_region(
    labels: NDArray[np.uint8],
    frame: HeadFrame,
    region: Region,
    side: int,
    edge: Volume,
    rng: np.random.Generator,
) -> None:
    """Paint one side of a region, each time a little elsewhere, larger or turned."""
    centre = np.array(region.centre_mm) * (side, 1, 1) + rng.normal(0, 0.6, 3)
    semi_axes = np.array(region.semi_axes_mm) * rng.normal(1, 0.05, 3)
    yaw, pitch, roll = rng.normal((side * region.yaw_deg, region.pitch_deg, 0), 4)
    rotation = Rotation.from_euler("zxy", (yaw, pitch, roll), degrees=True)
    box = frame.box(centre, 1.5 * float(semi_axes.max()))
    axes = [axis[part] for axis, part in zip(frame.axes, box, strict=True)]
    inside = ellipsoid_radius(axes, centre, semi_axes, rotation) < 1 + 0.08 * edge[box]
    labels[box][inside & (labels[box] > 0)] = region.label
