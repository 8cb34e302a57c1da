"""The 48 orders in which a head may be stored, and heads to store, made by numpy alone."""

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry

SHAPE = (27, 34, 30)


class Storage(NamedTuple):
    """Which axes of the head a file has, and which of them run the other way."""

    order: tuple[int, ...]
    flipped: tuple[bool, ...]

    def of(self, volume):
        """Return a volume as it is stored."""
        return np.ascontiguousarray(np.flip(volume.transpose(self.order), self._flipped))

    def back(self, volume):
        """Return a stored volume in the head's axes."""
        return np.flip(volume, self._flipped).transpose(np.argsort(self.order))

    def affine(self, affine, shape):
        """Return the affine of what is stored."""
        stored = affine.copy()
        for axis, (source, flip) in enumerate(zip(*self, strict=True)):
            stored[:, axis] = -affine[:, source] if flip else affine[:, source]
            stored[:, 3] += flip * (shape[source] - 1) * affine[:, source]
        return stored

    def vector(self, vector):
        """Return a vector in the stored axes."""
        return [-vector[n] if flip else vector[n] for n, flip in zip(*self, strict=True)]

    def sizes(self, sizes):
        """Return lengths along the stored axes."""
        return [sizes[n] for n in self.order]

    @property
    def letters(self):
        """Where the stored axes run to, of a head in RAS."""
        return "".join("LPI"[n] if flip else "RAS"[n] for n, flip in zip(*self, strict=True))

    @property
    def _flipped(self):
        return [axis for axis in range(3) if self.flipped[axis]]


STORAGES = [
    Storage(order, flipped)
    for order in itertools.permutations(range(3))
    for flipped in itertools.product((False, True), repeat=3)
]
SPREAD = [STORAGES[n] for n in (0, 6, 13, 19, 24, 31, 33, 44)]  # every order, every end


@dataclass(frozen=True)
class Head:
    """A head on a grid, and how its header says where that lies."""

    affine: np.ndarray
    forms: str
    stated: tuple[float, ...]
    grid: Geometry
    volumes: dict[str, np.ndarray]

    def save(self, path, storage, data, affine=None):
        """Write a volume as it is stored."""
        image = nib.Nifti1Image(storage.of(data), None)
        image.header["qform_code"] = 0
        image.header.set_zooms(storage.sizes(self.grid.voxel_size_mm))
        matrix = storage.affine(self.affine if affine is None else affine, data.shape)
        if "q" in self.forms:
            image.set_qform(matrix, 1)
        if "s" in self.forms:
            image.set_sform(matrix, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        return path


def rotated(axes, degrees, voxel=(5, 5, 5)):
    """Return an affine whose grid is turned in the scanner."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler(axes, degrees, degrees=True).as_matrix() * voxel
    affine[:3, 3] = -61.5, -80.25, -70
    return affine


THICK = rotated("x", 30, (4, 4, 10))  # voxels of which a test says 0.8 x 0.8 x 2 in other units
GRIDS = {
    "upright": (rotated("x", 0), "s", ()),
    "tilted": (rotated("xy", (12, 7)), "s", ()),
    "tilted, qform": (rotated("xy", (12, 7)), "q", ()),
    "45 degrees": (rotated("x", 45), "s", ()),
    "45 degrees, qform": (rotated("y", -45), "q", ()),
    "thick slices": (THICK, "qs", ()),
    "thick slices, qform": (THICK, "q", ()),
    "stated": (rotated("xz", (5, 8)), "s", (1, 1, 1)),
}


@cache
def head(name):
    """Return a head with its magnitude."""
    affine, forms, stated = GRIDS[name]
    grid = Geometry.from_affine(SHAPE, affine)
    if stated:
        grid = replace(grid, b0_direction=stated)
    drawn = head_phantom(grid, seed=501, lesions=False)
    rng = np.random.default_rng(2)
    signal = drawn.mask * (2 + np.tanh(20 * drawn.chi_ppm) + 0.02 * rng.normal(size=SHAPE))
    volumes = {
        "field": drawn.local_field_ppm,
        "mask": drawn.mask.astype(np.uint8),
        "truth": drawn.chi_ppm,
        "labels": drawn.labels,
        "magnitude": signal.astype(np.float32),
    }
    return Head(affine, forms, stated, grid, volumes)


def require_one(maps):
    """Check that maps are the same in every bit, and that there is something on them."""
    first, *others = maps
    assert len(others) > 6
    assert np.ptp(first) > 0.02
    for other in others:
        np.testing.assert_array_equal(first, other)
