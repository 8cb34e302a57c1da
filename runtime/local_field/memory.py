"""Predicting the peak memory of the way from echoes to a local field, in bytes."""

import math

import numpy as np

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import MemoryLimitError
from qsm_deploy.kernels.geometry import Geometry, Mask
from qsm_deploy.kernels.inversion.grid import padded_box
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.local_field.background.removal import BackgroundRemoval
from qsm_deploy.runtime.local_field.echoes import READ

ECHO = 8  # the same, stacked; as much again in the box of the mask
UNWRAPPED = 200  # per voxel of the mask, at the peak; 160 to 202 were measured
LIBRARIES_BYTES = 70e6  # what graphs and least squares load and keep, whatever the size
FIELDS = 12  # per voxel: the field, its noise and its misfit
REMOVED = 60  # per voxel of the padded grid, at the peak; 30 to 56 were measured


def stage_bytes(
    echoes: int, mask: Mask, geometry: Geometry, remove: BackgroundRemoval
) -> dict[str, float]:
    """Return what each stage takes.

    Parameters
    ----------
    echoes
        How many; 0 where it begins with a total field.
    mask
        (x, y, z) bool, not empty.
    geometry
        The grid.
    remove
        The method.
    """
    box = math.prod(side.stop - side.start for side in bounding_box(mask))
    padded = padded_box(mask, geometry, around_mm=remove.around_mm).geometry.shape
    removal = FIELDS * mask.size + REMOVED * math.prod(padded)
    stages: dict[str, float] = {"background removal": removal}
    if echoes:
        field = ECHO * echoes * (mask.size + box) + UNWRAPPED * int(np.count_nonzero(mask))
        stages["field mapping"] = LIBRARIES_BYTES + max(field, READ * echoes * mask.size)
    return stages


def require_memory(stages: dict[str, float], limit_bytes: float) -> None:
    """Refuse stages that take more memory than there is.

    Raises
    ------
    MemoryLimitError
        If one does.
    """
    name, needed = max(stages.items(), key=lambda item: item[1], default=("", 0))
    if needed > limit_bytes:
        raise MemoryLimitError(
            f"{name} would take {memory_text(needed)}, {memory_text(limit_bytes)} are left; give "
            "a smaller mask or fewer echoes, raise --memory-limit or free memory"
        )
