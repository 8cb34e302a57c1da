"""How far a map of a lower precision is from that of FP32: in ppb, and in XSIM."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.runtime.metrics.difference import difference_ppb, distribution_ppb
from qsm_deploy.runtime.metrics.metrics import xsim
from qsm_deploy.runtime.scan.scan import Scan


@dataclass(frozen=True)
class MapError:
    """The in-mask error; all NaN where the map is not finite.

    Attributes
    ----------
    mean_ppb, median_ppb, p999_ppb, max_ppb
        Of its magnitude.
    xsim_change
        By how much the XSIM with the truth differs between the two maps; without a truth, by how
        much their XSIM with each other falls short of 1.
    """

    mean_ppb: float
    median_ppb: float
    p999_ppb: float
    max_ppb: float
    xsim_change: float

    def __str__(self) -> str:
        return (
            f"median {self.median_ppb:.2g} ppb, p99.9 {self.p999_ppb:.2g} ppb, max "
            f"{self.max_ppb:.2g} ppb, XSIM change {self.xsim_change:.2g}"
        )


def map_error(got: NDArray[np.float32], exact: NDArray[np.float32], scan: Scan) -> MapError:
    """Compare two maps.

    Parameters
    ----------
    got, exact
        (x, y, z) susceptibility [ppm].
    scan
        What both were made from, with its mask and, if it has one, its truth.
    """
    mask, truth = scan.mask, scan.truth_ppm
    if not np.isfinite(got[mask]).all():
        return MapError(*[float("nan")] * len(fields(MapError)))
    found = distribution_ppb(difference_ppb(got, exact, mask))
    if truth is None:
        change = 1 - xsim(got, exact, mask)
    else:
        change = abs(xsim(got, truth, mask) - xsim(exact, truth, mask))
    del found["bias_ppb"]
    return MapError(**found, xsim_change=change)


def worst(errors: Sequence[MapError]) -> MapError:
    """Return the largest of each number, NaN if one is."""
    return MapError(
        *(float(np.max([getattr(e, field.name) for e in errors])) for field in fields(MapError))
    )
