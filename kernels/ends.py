"""The ends of the head that axes run to, by letters such as LPS."""

from qsm_deploy.kernels.errors import GeometryError

ENDS = ("LR", "PA", "IS")  # of each of the scanner's axes
RAS = "RAS"


def ends_named(letters: str) -> list[tuple[int, bool]]:
    """Return for each axis which of the scanner's it lies along, and whether it runs against that.

    Raises
    ------
    GeometryError
        If they are no three ends of three different axes.
    """
    places = [next((n for n, ends in enumerate(ENDS) if c in ends), -1) for c in letters]
    if sorted(places) != [0, 1, 2]:
        raise GeometryError(
            f"axes are {letters!r}, expected three letters such as RAS or LPS: the ends, one of "
            "R and L, A and P, S and I, that x, y and z run to"
        )
    return [(place, c == ENDS[place][0]) for place, c in zip(places, letters, strict=True)]
