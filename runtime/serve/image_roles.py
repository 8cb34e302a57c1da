"""What an image is, and which volume it belongs to, by its header and attributes."""

import math
from typing import Literal, NamedTuple

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.serve.codec import Image

Role = Literal["magnitude", "phase", "mask", "field"]

PHASE_TYPE, MAGNITUDE_TYPE, REAL_TYPE = 2, 1, 3
TYPE_NAMES = {4: "imaginary", 5: "complex", 6: "colour"}
TYPE_ATTRIBUTES = ("ImageType", "ImageTypeValue3", "ImageTypeValue4", "ComplexImageComponent")
DISTORTION_TOKENS = {"ND", "DIS2D", "DIS3D"}  # without and with correction, in one or three planes


class EchoKey(NamedTuple):
    """What distinguishes echoes: the place in the header's list, and the image's own time."""

    place: int
    own_time_ms: float | None


def role_of(image: Image) -> Role:
    """Return what an image shows; a real one is a field.

    Raises
    ------
    DataError
        If it is complex, in colour, or has several channels, or nothing says what it is.
    """
    kind, tokens = image.head.image_type, image_tokens(image)
    if image.head.channels != 1 or image.pixels.dtype.kind == "c" or kind in TYPE_NAMES:
        name = TYPE_NAMES.get(kind, f"{image.pixels.dtype} with {image.head.channels} channels")
        raise DataError(
            f"an image of type {name} in series {image.head.image_series_index}; send magnitude "
            "and phase, of one channel"
        )
    if "MASK" in tokens:
        return "mask"
    if kind == PHASE_TYPE or tokens & {"P", "PHASE"}:
        return "phase"
    if kind == MAGNITUDE_TYPE or tokens & {"M", "MAGNITUDE"}:
        return "magnitude"
    if kind == REAL_TYPE:
        return "field"
    raise DataError(
        f"an image of series {image.head.image_series_index} says neither by image_type ({kind}) "
        "nor by its attribute ImageType whether it is magnitude or phase"
    )


def image_tokens(image: Image) -> set[str]:
    """Return the words of an image's type, such as ``ORIGINAL``, ``P`` and ``ND``."""
    values = [v for name in TYPE_ATTRIBUTES for v in image.values(name)]
    return {token.strip().upper() for value in values for token in value.split("\\")}


def echo_key(image: Image) -> EchoKey:
    """Return the echo of an image: its attribute ``EchoNumber``, from 1, or else ``contrast``.

    Raises
    ------
    DataError
        If an attribute is not a number.
    """
    number = number_attribute(image, "EchoNumber")
    place = int(image.head.contrast) if number is None else int(number) - 1
    return EchoKey(place, number_attribute(image, "EchoTime"))


def repetition_key(image: Image) -> tuple[int, int, int, int]:
    """Return what distinguishes repeated measurements of the same echo."""
    head = image.head
    return head.repetition, head.average, head.set, head.phase


def number_attribute(image: Image, name: str) -> float | None:
    """Return an attribute that is a number.

    Raises
    ------
    DataError
        If it is none.
    """
    values = image.values(name)
    if not values:
        return None
    try:
        number = float(values[0])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"the attribute {name} of an image is {values[0][:80]!r}, not a number")
    return number
