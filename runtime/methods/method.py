"""The methods that need no network, by name: what each is, and what may be said to it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.reconstruction.ranges import (
    THRESHOLD,
    WEIGHT,
    require_iterations,
    require_within,
)

DEFAULT = "tv"  # where neither a model nor a method is named
OF_TV = ("alpha", "iterations", "robust", "magnitude", "noise_map")


@dataclass(frozen=True)
class Row:
    """A method: its title, what may be said to it, and how many fields it takes."""

    title: str
    options: tuple[str, ...]
    field_counts: range = range(1, 2)
    doi: str | None = None


METHODS: Mapping[str, Row] = {
    "tv": Row("total variation, by ADMM", OF_TV),
    "tkd": Row("thresholded k-space division", ("threshold",), doi="10.1002/mrm.22135"),
    "tikhonov": Row("Tikhonov's regularisation, in closed form", ("lam",)),
    "medi": Row("morphology-enabled inversion, by ADMM", OF_TV, doi="10.1002/mrm.22816"),
    "ilsqr": Row("iLSQR, as published", ("iterations",), doi="10.1016/j.neuroimage.2014.12.043"),
    "cosmos": Row(
        "several orientations, by least squares", ("iterations",), range(2, 65), "10.1002/mrm.21828"
    ),
}


@dataclass(frozen=True)
class Method:
    """A method and what is said to it; ``None`` leaves the choice to it.

    Attributes
    ----------
    name
        One of :data:`METHODS`.
    alpha
        Weight of the edges [ppm mm], 1e-9 to 1000; ``None`` takes it from the noise.
    iterations
        Number of them, 1 to 10,000.
    robust
        Whether voxels that no map explains are told from the others and dropped.
    threshold
        Smallest |D| that TKD divides by, 1e-3 to 2/3.
    lam
        Tikhonov's weight, 1e-9 to 1000.

    Raises
    ------
    UsageError
        If there is no such method, or it does not take what is said to it.
    """

    name: str = DEFAULT
    alpha: float | None = None
    iterations: int | None = None
    robust: bool = False
    threshold: float | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UsageError(f"no method {self.name!r}; there are {', '.join(METHODS)}")
        self.require_takes(self.said())
        for name, limits, unit in (
            ("alpha", WEIGHT, " ppm mm"),
            ("threshold", THRESHOLD, ""),
            ("lam", WEIGHT, ""),
        ):
            if (value := getattr(self, name)) is not None:
                require_within(_flag(name), value, limits, unit)
        if self.iterations is not None:
            require_iterations("--iterations", self.iterations)
        if not isinstance(self.robust, bool):
            raise UsageError(f"robust must be True or False, got {self.robust!r}")

    @property
    def row(self) -> Row:
        """Its line in the table."""
        return METHODS[self.name]

    def require_takes(self, said: Mapping[str, Any]) -> None:
        """Check that it takes what is said to it, options and volumes alike.

        Raises
        ------
        UsageError
            If not.
        """
        for name, value in said.items():
            if value is not None and value is not False and name not in self.row.options:
                takers = [other for other, row in METHODS.items() if name in row.options]
                flag, takes = _flag(name), ", ".join(map(_flag, self.row.options))
                raise UsageError(f"{flag} is for {' and '.join(takers)}; {self.name} takes {takes}")

    def said(self) -> dict[str, Any]:
        """Return what was said, by name."""
        return {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k != "name" and v not in (None, False)
        }


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
