"""The acquisitions that ranges are measured on: real field maps, or phantoms if asked for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qsm_deploy.calibration.int8.volume_files import VolumeFiles, find_volumes
from qsm_deploy.calibration.phantom.measured_head import scan_from_phantom
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.errors import DataError, GeometryError, UnitsError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.terminal import Progress, no_progress
from qsm_deploy.runtime.reconstruction.inversion import Wants, needs_of
from qsm_deploy.runtime.reconstruction.preparation import prepare
from qsm_deploy.runtime.scan.agreement import varies
from qsm_deploy.runtime.scan.geometry_limits import deviations
from qsm_deploy.runtime.scan.params import Params, load_params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles, load_scan
from qsm_deploy.runtime.scan.unit_names import FieldUnit

PHANTOMS = "phantoms"
# of heads for a network that takes any grid; one that does not gets the shapes on its own grid
GRIDS = (
    Geometry((160, 192, 160)),
    Geometry((160, 192, 144), (1.0, 1.0, 1.2), (0.0, 0.34, 0.94)),
    Geometry((180, 216, 84), (0.9, 0.9, 2.0), (0.5, 0.1, 0.86)),
)
FIRST_SEED = 100  # apart from those of the phantoms that accuracy is measured on


@dataclass(frozen=True)
class CalibrationData:
    """Acquisitions, the digest of what they hold, and what the user should know of them."""

    scans: tuple[Scan, ...]
    sha256: str
    notes: tuple[str, ...]


def load_calibration(
    source: str,
    card: ModelCard,
    units: FieldUnit | None = None,
    *,
    progress: Progress = no_progress,
) -> CalibrationData:
    """Read acquisitions that a network may be used on.

    Parameters
    ----------
    source
        A folder or a list, see :func:`qsm_deploy.calibration.int8.volume_files.find_volumes`, or
        ``phantoms``, which draws three heads.
    card
        Of the network: which grids and how many orientations it takes.
    units
        What the files hold; by default what the network takes. Echo time and field strength are
        in ``params.json`` beside a map.
    progress
        Shows how far it is.

    Raises
    ------
    DataError
        If there are no maps, one has no mask, is constant or unreadable.
    UnitsError
        If the values cannot be in the stated unit.
    GeometryError
        If a map is on a grid that the network is not for.
    UsageError
        If units are stated for phantoms, or the network takes maps besides the field.
    """
    if source == PHANTOMS:
        if units is not None:
            raise UsageError("--calibration-units is about files; phantoms are drawn in ppm")
        scans = _phantoms(card, progress)
        return CalibrationData(tuple(scans), _digest(scans), ())
    needs = needs_of(card)
    if needs.maps:
        raise UsageError(
            f"{card.network} takes {' and '.join(needs.maps)} besides the field, which is not read "
            f"here: pass --calibration {PHANTOMS}"
        )
    files = find_volumes(Path(source))
    notes: list[str] = []
    scans = []
    for one in progress(files, "reading calibration maps"):
        reading = Reading(
            needs.quantity, units, from_file=_params(one), keeps_outside=needs.unmasked
        )
        scan = _load(one, card, reading)
        notes += [f"{one.fields[0]}: {note}" for note in scan.notes]
        scans.append(scan)
    if len(scans) == 1:
        notes.append(
            "one map only for the calibration: ranges of one head may clip the next; pass several, "
            "of different heads, shapes and orientations"
        )
    return CalibrationData(tuple(scans), _digest(scans), tuple(notes))


def _load(files: VolumeFiles, card: ModelCard, reading: Reading) -> Scan:
    first = files.fields[0]
    if len(files.fields) not in card.field_counts:
        raise UsageError(
            f"{first}: {card.network} takes {card.field_counts[0]} fields of each head, "
            f"{len(files.fields)} are there; list them: FIELD FIELD ... MASK"
        )
    try:
        scan = load_scan(ScanFiles(files.fields, files.mask), reading)
    except UnitsError as error:
        text = str(error).replace("--units", "--calibration-units")
        raise UnitsError(
            f"{text}; echo_time_s and field_strength_t are taken from params.json beside the maps"
        ) from None
    try:  # as the network will be given it
        scan = prepare(needs_of(card), scan, Wants()).scan
    except GeometryError:
        raise GeometryError(
            f"{first}: {'; '.join(deviations(card.geometry, scan.geometry))}; calibrate with maps "
            "that the network is for"
        ) from None
    values = scan.measured[:, scan.mask].astype(np.float64)
    if not varies(values.ravel()):
        raise DataError(
            f"{first}: constant inside its mask ({values.flat[0]:.4g}); pass a measured field map"
        )
    return scan


def _params(files: VolumeFiles) -> Params:
    """Return what is said of the acquisition; the grid is that of the header."""
    if files.params is None:
        return Params()
    return replace(load_params(files.params), voxel_size_mm=None, b0_direction=None)


def _phantoms(card: ModelCard, progress: Progress) -> list[Scan]:
    limits = card.geometry
    scans = []
    for n, grid in enumerate(progress(GRIDS, "drawing phantoms")):
        own = Geometry(
            grid.shape,
            limits.voxel_size_mm or grid.voxel_size_mm,
            limits.b0_direction or grid.b0_direction,
        )
        scans.append(scan_from_phantom(card, head_phantom(own, seed=FIRST_SEED + n)))
    return scans


def _digest(scans: Sequence[Scan]) -> str:
    digest = hashlib.sha256()
    for scan in scans:
        digest.update(f"{scan.geometry} {scan.more_b0_directions}".encode())
        digest.update(scan.measured.tobytes())
        digest.update(np.packbits(scan.mask).tobytes())
    return digest.hexdigest()
