"""What removes a background field, whichever method it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.ndimage import distance_transform_edt

from qsm_deploy.kernels.errors import DataError, MemoryLimitError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.grid import PaddedBox, padded_box
from qsm_deploy.runtime.console.peak_memory import memory_text

BYTES_PER_VOXEL = 50  # of the padded grid, at the peak; 30 to 47 were measured


@dataclass(frozen=True)
class Task:
    """A field from which the background is to be removed.

    Attributes
    ----------
    field_ppm
        (x, y, z) field of all sources; what lies outside the mask is ignored.
    mask
        (x, y, z) bool, where the local field is wanted.
    trusted
        (x, y, z) bool, where the field may be believed; within the mask.
    geometry
        The grid.
    done
        Called after each of the method's steps.

    Raises
    ------
    DataError
        If nothing is trusted.
    """

    field_ppm: Volume
    mask: Mask
    trusted: Mask
    geometry: Geometry
    done: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        if not self.trusted.any():
            raise DataError(
                f"the mask has {np.count_nonzero(self.mask)} voxels, and the field is trusted in "
                "none of them; pass a larger mask, or ask less of a voxel"
            )


class BackgroundRemoval(Protocol):
    """A method, whose attributes are its parameters."""

    @property
    def around_mm(self) -> float:
        """How far around the mask its grid reaches."""

    @property
    def steps(self) -> int:
        """How often it calls ``done``, at most."""

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm], 0 outside a mask, and that mask, the task's or less."""


def padded(task: Task, remove: BackgroundRemoval) -> PaddedBox:
    """Return the grid that a method works on."""
    return padded_box(task.mask, task.geometry, around_mm=remove.around_mm)


def require_memory(remove: BackgroundRemoval, task: Task, limit_bytes: float) -> None:
    """Refuse a task that takes more memory than there is.

    Raises
    ------
    MemoryLimitError
        If it does.
    """
    shape = padded(task, remove).geometry.shape
    needed = BYTES_PER_VOXEL * math.prod(shape)
    if needed > limit_bytes:
        raise MemoryLimitError(
            f"background removal on {' x '.join(map(str, shape))} voxels would take "
            f"{memory_text(needed)}, {memory_text(limit_bytes)} are left; give a smaller mask"
        )


def trusted_field(task: Task, grid: PaddedBox) -> Volume:
    """Return the field on a padded grid, 0 outside the mask.

    Voxels that are not trusted take the nearest one's that is: means of neighbours need them.
    """
    field = grid.embed(task.field_ppm)
    inside, trusted = grid.embed_mask(task.mask), grid.embed_mask(task.trusted)
    lost = inside & ~trusted
    if lost.any():
        nearest = distance_transform_edt(
            ~trusted,
            sampling=task.geometry.voxel_size_mm,
            return_distances=False,
            return_indices=True,
        )
        field[lost] = field[tuple(nearest[:, lost])]
    field[~inside] = 0
    return field
