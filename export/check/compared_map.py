"""One comparison with the maps that it was made of."""

from dataclasses import dataclass

from qsm_deploy.export.check.cases import Case
from qsm_deploy.export.measure.comparison import Row, Volume


@dataclass(frozen=True)
class Compared:
    """What was run, the numbers, and both maps [ppm] on the grid that they are compared on."""

    case: Case
    row: Row
    engine_ppm: Volume
    reference_ppm: Volume
