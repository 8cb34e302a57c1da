"""What removes a background field, whichever method it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from qsm_deploy.kernels.geometry import Geometry, Mask, Volume


@dataclass(frozen=True)
class Task:
    """A field from which the background is to be removed.

    Attributes
    ----------
    field_ppm
        (x, y, z) field of all sources; what lies outside the mask is ignored.
    mask
        (x, y, z) bool, where the local field is wanted; not empty.
    trusted
        (x, y, z) bool, where the field may be believed; within the mask.
    geometry
        The grid.
    done
        Called after each of the method's steps.
    """

    field_ppm: Volume
    mask: Mask
    trusted: Mask
    geometry: Geometry
    done: Callable[[], object] = lambda: None


class BackgroundRemoval(Protocol):
    """A method, whose attributes are its parameters."""

    @property
    def steps(self) -> int:
        """How often it calls ``done``."""

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm], 0 outside a mask, and that mask, the task's or less."""
