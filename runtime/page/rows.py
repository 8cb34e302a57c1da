"""The rows of a picture or a page: volumes of one acquisition, each with its unit and window."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.reconstruction.inversion import CHI
from qsm_deploy.runtime.scan.scan import Quantity, Scan
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

FIELD_WINDOW_PPM = (-0.05, 0.05)
TOTAL_WINDOW_PPM = (-0.5, 0.5)
CHI_WINDOW_PPM = (-0.1, 0.2)
PHASE_WINDOW_RAD = (-math.pi, math.pi)
ERROR_WINDOW_PPM = (-0.05, 0.05)


class Row(NamedTuple):
    """One line of a picture: a volume, its factor to the unit shown, and the window in that.

    A page holds whole numbers, ``steps`` of them to the volume's own unit: ppb or milliradian.
    """

    name: str
    volume: Volume
    window: tuple[float, float]
    unit: str = "ppm"
    factor: float = 1.0
    colours: str = "gray"
    steps: float = 1000.0


# of what is given: its title, and the window that it is shown in
GIVEN = {
    "local_field_ppm": ("local field", FIELD_WINDOW_PPM),
    CHI: ("susceptibility χ", CHI_WINDOW_PPM),
    "chi_positive_ppm": ("paramagnetic χ+", CHI_WINDOW_PPM),
    "chi_negative_ppm": ("diamagnetic χ-", CHI_WINDOW_PPM),
}
_MEASURED: dict[Quantity, Callable[[Volume], Row]] = {
    "local_field_ppm": lambda field: Row("local field", field, FIELD_WINDOW_PPM),
    "total_field_ppm": lambda field: Row("total field", field, TOTAL_WINDOW_PPM),
    "phase_rad": lambda phase: Row("phase", phase, PHASE_WINDOW_RAD, "rad"),
}


def scan_rows(
    scan: Scan,
    maps: Mapping[str, Volume],
    *,
    unit: str = "ppm",
    window: Sequence[float] | None = None,
) -> list[Row]:
    """Return the rows of a reconstruction: field, maps, and with a truth that and the error.

    Parameters
    ----------
    scan
        The acquisition.
    maps
        (x, y, z) volumes [ppm] that were made of it, by their names in cards.
    unit
        ``ppm`` or ``ppb``, that they are shown in.
    window
        Of the maps, in their unit; by default -0.1 to 0.2 ppm, of a local field -0.05 to 0.05.
    """
    factor = PPB_PER_PPM if unit == "ppb" else 1.0

    def shown(name: str, volume: Volume, default: Sequence[float]) -> Row:
        low, high = default
        return Row(name, volume, (factor * low, factor * high), unit, factor)

    rows = [_MEASURED[scan.quantity](scan.measured[0])]
    for name, volume in maps.items():
        row = shown(GIVEN[name][0], volume, GIVEN[name][1])
        rows.append(row if window is None else row._replace(window=(window[0], window[1])))
    if scan.truth_ppm is not None:
        first = next(iter(maps.values()))
        rows.append(rows[1]._replace(name="true χ", volume=scan.truth_ppm))
        rows.append(shown("error of χ", first - scan.truth_ppm, ERROR_WINDOW_PPM))
    return rows


def require_one_grid(rows: Sequence[Row], mask: Mask, geometry: Geometry) -> None:
    """Refuse volumes of another shape than their geometry's.

    Raises
    ------
    GeometryError
        If there is one.
    """
    for name, volume in (("mask", mask), *((row.name, row.volume) for row in rows)):
        if volume.shape != geometry.shape:
            raise GeometryError(
                f"the {name} has shape {volume.shape}, its geometry says {geometry.shape}"
            )
