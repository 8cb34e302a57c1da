"""What every configuration of the server takes and gives."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import nibabel as nib
import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.unit_names import FieldUnit
from qsm_deploy.runtime.scan.units import require_ppm
from qsm_deploy.runtime.serve.acquisition import HeaderValues
from qsm_deploy.runtime.serve.codec import Image
from qsm_deploy.runtime.serve.parameters import Parameters
from qsm_deploy.runtime.serve.stacks import Stack


@dataclass(frozen=True)
class Request:
    """What a session asks for: its images, its header's values, its parameters.

    The scan has the magnitude of all echoes, and the noise of the field, if it is to keep one and
    there is one.
    """

    images: Sequence[Image]
    header: HeaderValues
    parameters: Parameters = field(default_factory=Parameters)
    keeps_magnitude: bool = False
    keeps_noise: bool = False


@dataclass(frozen=True)
class Source:
    """What a configuration makes of a request.

    Attributes
    ----------
    stack
        The images whose geometry the map has.
    scan
        The local field for the network.
    """

    stack: Stack
    scan: Scan


class Configuration(Protocol):
    """From a request to a local field, with lines that tell the host how far it is."""

    def __call__(self, request: Request, stages: Stages) -> Generator[str, None, Source]:
        """Yield lines and return the source."""


def require_finite(field: Volume, mask: Mask) -> None:
    """Refuse NaN and Inf inside a mask.

    Raises
    ------
    DataError
        If there are any.
    """
    if bad := int(np.count_nonzero(~np.isfinite(field[mask]))):
        raise DataError(f"{bad} of {np.count_nonzero(mask)} voxels inside the mask are NaN or Inf")


def scan_of(
    local_field_ppm: Volume,
    mask: Mask,
    stack: Stack,
    unit: FieldUnit,
    notes: Sequence[str],
    magnitude: Volume | None = None,
    noise_ppm: Volume | None = None,
) -> Scan:
    """Return a scan of one local field.

    Parameters
    ----------
    local_field_ppm
        (x, y, z) field; what lies outside the mask is dropped.
    mask
        (x, y, z) bool, not empty.
    stack
        Where it lies.
    unit
        What it was converted from.
    notes
        What the host should know about it already.
    magnitude, noise_ppm
        (x, y, z) signal and noise of the field, if they are needed.

    Raises
    ------
    DataError
        If values inside the mask are NaN or Inf.
    UnitsError
        If they cannot be right.
    """
    require_finite(local_field_ppm, mask)
    values = local_field_ppm[mask]
    found = require_ppm(values, unit)
    measured = np.zeros((1, *mask.shape), dtype=np.float32)
    measured[0][mask] = values
    header = nib.Nifti1Header()
    header.set_data_shape(mask.shape)
    header.set_sform(stack.affine, code=1)
    return Scan(
        measured,
        mask,
        stack.geometry,
        header,
        stack.affine,
        magnitude=None if magnitude is None else magnitude * mask,
        noise_ppm=None if noise_ppm is None else noise_ppm * mask,
        b0_from="the images' directions",
        notes=[*notes, *found],
    ).canonical()
