"""Which numbers may be said to what makes a map: those for which float32 holds all of it."""

from numbers import Integral, Real

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
    least, most = limits
    if not (isinstance(value, Real) and least <= value <= most):
        raise UsageError(f"{flag} must be {least:g} to {most:.4g}{unit}, got {value!r}")


def require_iterations(flag: str, count: object) -> None:
    """Refuse what is no number of iterations.

    Raises
    ------
    UsageError
        With the most there may be, ``flag`` and the number.
    """
    if not isinstance(count, Integral) or count is True or not 1 <= count <= MOST_ITERATIONS:
        raise UsageError(f"{flag} must be 1 to {MOST_ITERATIONS}, and whole, got {count!r}")
