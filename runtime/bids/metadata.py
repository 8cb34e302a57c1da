"""What the JSON files of a BIDS dataset say of an image, with inheritance."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, UnitsError
from qsm_deploy.runtime.bids.layout import BidsImage
from qsm_deploy.runtime.local_field.echo_images import EchoImage
from qsm_deploy.runtime.scan.params import Params, load_json_object
from qsm_deploy.runtime.scan.unit_names import UNITS, FieldUnit, unit_named


def load_metadata(image: BidsImage) -> dict[str, Any]:
    """Return the fields that apply to an image, those closest to it first.

    A file applies if it has the image's suffix, none but the image's pairs, and lies in the
    image's folder or above it within the dataset. BIDS allows one in each folder. Where there are
    several, that of the image's own name is read and the plainer ones beside it are not, as the
    BIDS validator does; those of the folders above are inherited as ever.

    Raises
    ------
    DataError
        If a file that applies was not downloaded or is not a JSON object, or if several in one
        folder apply and none has the image's own name.

    References
    ----------
    BIDS specification 1.10, "The Inheritance Principle"; ``walkBack`` of
    ``bids-validator-deno`` 3.0.2.
    """
    merged: dict[str, Any] = {}
    for path in applying_files(image, ".json"):
        merged |= load_json_object(path)
    return merged


def applying_files(image: BidsImage, ending: str) -> list[Path]:
    """Return the files of an ending that say something of an image, the closest last.

    Raises
    ------
    DataError
        If several in one folder apply and none has the image's own name.
    """
    found: list[Path] = []
    for folder in _folders(image):
        names = _names(folder, folder.stat().st_mtime_ns, ending)
        applying = [folder / name for name in names if _applies(name, image, ending)]
        if len(applying) > 1:
            exact = [path for path in applying if len(path.name.split("_")) > len(image.entities)]
            if len(exact) != 1:
                raise DataError(
                    f"{applying[0]} and {applying[1].name} both apply to {image.path.name}; BIDS "
                    "allows one in each folder, unless one has the image's own name"
                )
            applying = exact
        found += applying
    return found


def echo_image(image: BidsImage) -> EchoImage:
    """Return an image of an echo with what the dataset says of it."""
    inherits = " nor in a file that it inherits from; add it"
    return EchoImage(image.path, load_metadata(image), str(_sidecar(image)), inherits)


def load_params_of(image: BidsImage) -> Params:
    """Return echo times, field strength and B0 direction of an image, as far as they are stated.

    Raises
    ------
    DataError
        If one of them is not a number (or three for the direction).
    """
    return echo_image(image).params


def field_unit(image: BidsImage, stated: FieldUnit | None) -> FieldUnit:
    """Return the unit of a local field.

    Parameters
    ----------
    image
        The field.
    stated
        What the command line says, for datasets whose JSON files say nothing.

    Raises
    ------
    UnitsError
        If neither says, they disagree, or the unit is none that can be read.
    """
    says = load_metadata(image).get("Units")
    if says is None:
        if stated is None:
            raise UnitsError(
                f"{_sidecar(image)}: Units are not stated; add ppm, Hz or rad, or pass --units"
            )
        return stated
    unit = unit_named(says) if isinstance(says, str) else None
    if unit is None:
        raise UnitsError(
            f"{_sidecar(image)}: Units are {says!r}, expected one of {', '.join(UNITS)}"
        )
    if stated not in (None, unit):
        raise UnitsError(f"{_sidecar(image)} says {says}, --units says {stated}; drop --units")
    return unit


def _folders(image: BidsImage) -> list[Path]:
    """Return the folders from the dataset's root to the image's."""
    inner = image.path.parent
    above = [folder for folder in inner.parents if folder.is_relative_to(image.root)]
    return [*reversed(above), inner]


@lru_cache(maxsize=8)
def _names(folder: Path, changed_ns: int, ending: str) -> tuple[str, ...]:
    """Return the files of an ending in a folder, by name.

    The root of a large dataset has one entry for every subject, which every image asks for.
    """
    return tuple(sorted(name for name in os.listdir(folder) if name.endswith(ending)))


def _applies(name: str, image: BidsImage, ending: str) -> bool:
    *pairs, suffix = name.removesuffix(ending).split("_")
    stated = [tuple(pair.split("-", 1)) for pair in pairs]
    return suffix == image.suffix and set(stated) <= set(image.entities.items())


def _sidecar(image: BidsImage) -> Path:
    return image.path.with_name(image.path.name.split(".nii")[0] + ".json")
