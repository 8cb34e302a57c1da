"""Which numbers may be said to what makes a map: those for which float32 holds all of it."""

from numbers import Integral, Real
from typing import Any

from qsm_deploy.kernels.errors import UsageError

WEIGHT = (1e-9, 1e3)  # of edges [ppm mm], of Tikhonov, of data consistency
THRESHOLD = (1e-3, 2 / 3)  # of tkd
MOST_ITERATIONS = 10_000


def require_within(flag: str, value: object, limits: tuple[float, float], unit: str = "") -> None:
    """Refuse what is no number within limits, both of them included.

    Raises
    ------
    UsageError
        With the limits, ``flag`` and the value.
    """
    number: Any = value  # or a type checker knows no order of Real
    if not (isinstance(value, Real) and limits[0] <= number <= limits[1]):
        least, most = limits
        raise UsageError(f"{flag} must be {least:g} to {most:.4g}{unit}, got {value!r}")


def require_iterations(flag: str, count: object) -> None:
    """Refuse what is no number of iterations.

    Raises
    ------
    UsageError
        With the most there may be, ``flag`` and the number.
    """
    number: Any = count
    whole = isinstance(count, Integral) and not isinstance(count, bool)
    if not (whole and 1 <= number <= MOST_ITERATIONS):
        raise UsageError(f"{flag} must be 1 to {MOST_ITERATIONS}, and whole, got {count!r}")
