"""The configuration ``dipole``: the images are a local field."""

from collections.abc import Generator

import numpy as np

from qsm_deploy.kernels.errors import DataError, UnitsError
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.scan.masks import mask_from_values
from qsm_deploy.runtime.scan.mistaken import refuse_other_than_field
from qsm_deploy.runtime.scan.unit_names import TURN, UNITS, FieldUnit
from qsm_deploy.runtime.scan.units import ppm_per_unit
from qsm_deploy.runtime.scan.wraps import require_unwrapped
from qsm_deploy.runtime.serve.acquisition import echo_time_s, field_strength_t
from qsm_deploy.runtime.serve.configuration import Request, Source, require_finite, scan_of
from qsm_deploy.runtime.serve.grouping import field_volume
from qsm_deploy.runtime.serve.image_roles import echo_key, number_attribute
from qsm_deploy.runtime.serve.stacks import Stack


def source_from_field(request: Request, stages: Stages) -> Generator[str, None, Source]:
    """Take a local field as it is, in the unit that the parameters state.

    Raises
    ------
    DataError
        If there is not one field, or its slices are scaled differently.
    UnitsError
        If its unit is not stated, lacks its parameters, or cannot be right.
    """
    with stages("group"):
        found = field_volume(request.images)
        ppm, unit = _ppm_of_one(found.field, request)
        slope, intercept = _scaling(found.field)
        field = found.field.volume()
        if (slope, intercept) != (1.0, 0.0):
            field *= np.float32(slope)
            field += np.float32(intercept)
        sent = (field != 0) if found.mask is None else found.mask.volume()
        mask, notes = mask_from_values(sent, "mask")
        require_finite(field, mask)
        refuse_other_than_field(field[mask])
        require_unwrapped(field, mask, TURN if unit == "rad" else None)
        field *= np.float32(-ppm if request.parameters.negate else ppm)
        scan = scan_of(field, mask, found.field, unit, [*found.notes, *notes])
    scaled = "" if (slope, intercept) == (1.0, 0.0) else f" of {slope:g} value + {intercept:g}"
    origin = "where the field is not zero" if found.mask is None else "as sent"
    yield f"{found.field.geometry}; field in {request.parameters.units}{scaled}; mask {origin}"
    return Source(found.field, scan)


def _ppm_of_one(stack: Stack, request: Request) -> tuple[float, FieldUnit]:
    """Return what one unit of the field is in ppm, and the unit that ranges are checked in."""
    units = request.parameters.units
    if units is None:
        raise UnitsError(
            "the unit of the local field is not stated; send the parameter units: "
            f"{', '.join(UNITS)}"
        )
    parts = units in ("ppm", "ppb")
    strength = None if parts else field_strength_t(request.header)
    time = echo_time_s(request.header, echo_key(stack.images[0])) if units == "rad" else None
    return ppm_per_unit(units, echo_time_s=time, field_strength_t=strength), units


def _scaling(stack: Stack) -> tuple[float, float]:
    """Return slope and intercept in the images' attributes: those of DICOM."""
    found = {
        (number_attribute(image, "RescaleSlope"), number_attribute(image, "RescaleIntercept"))
        for image in stack.images
    }
    if len(found) > 1:
        raise DataError("RescaleSlope or RescaleIntercept differ between the slices of the field")
    slope, intercept = found.pop()
    return 1.0 if slope is None else slope, intercept or 0.0
