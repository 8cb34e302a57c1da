"""Echo times and field strength, from the header or the attributes; never from nowhere."""

from collections.abc import Mapping, Sequence

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.scan.unit_names import field_strength
from qsm_deploy.runtime.serve.image_roles import EchoKey

HeaderValues = Mapping[str, Sequence[str]]

TE = "sequenceParameters/TE"
FIELD_STRENGTH = "acquisitionSystemInformation/systemFieldStrength_T"
RESONANCE = "experimentalConditions/H1resonanceFrequency_Hz"
TE_TOLERANCE_MS = 0.05
ECHO_TIMES_MS = (0.1, 500.0)
FIELD_STRENGTHS_T = (0.01, 30.0)


def echo_time_s(header: HeaderValues, echo: EchoKey) -> float:
    """Return the time of an echo [s].

    Parameters
    ----------
    header
        The values of the session's header.
    echo
        Where it stands in the header's list, and what its images say themselves.

    Raises
    ------
    DataError
        If neither says it, they contradict each other, or it cannot be right.
    """
    listed = [_number(TE, value) for value in header.get(TE, [])]
    in_header = listed[echo.place] if 0 <= echo.place < len(listed) else None
    time_ms = in_header if echo.own_time_ms is None else echo.own_time_ms
    if time_ms is None:
        raise DataError(
            f"no echo time for echo {echo.place + 1}: the header's {TE} has {len(listed)} values "
            "and the images have no attribute EchoTime [ms]"
        )
    if in_header is not None and abs(in_header - time_ms) > TE_TOLERANCE_MS:
        raise DataError(
            f"echo {echo.place + 1} is at {in_header:g} ms in the header and at {time_ms:g} ms in "
            "the attribute EchoTime of its images; correct one"
        )
    shortest, longest = ECHO_TIMES_MS
    if not shortest <= time_ms <= longest:
        raise DataError(f"an echo time of {time_ms:g} ms cannot be right ({shortest} to {longest})")
    return time_ms / 1000


def field_strength_t(header: HeaderValues) -> float:
    """Return the strength of B0 [T].

    Raises
    ------
    DataError
        If the header does not say it, or it cannot be right.
    """
    nominal, hertz = (
        _number(name, header[name][0]) if header.get(name) else None
        for name in (FIELD_STRENGTH, RESONANCE)
    )
    strength = field_strength(nominal, None if hertz is None else hertz / 1e6)
    if strength is None:
        raise DataError(f"the header lacks the field strength: {FIELD_STRENGTH} or {RESONANCE}")
    weakest, strongest = FIELD_STRENGTHS_T
    if not weakest <= strength <= strongest:
        raise DataError(f"a field strength of {strength:g} T cannot be right; check the header")
    return strength


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"the header's {name} is {text!r}, not a number") from None
