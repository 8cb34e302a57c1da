"""Which series of a study a map is made of: the phase and its magnitude."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.dicom.acquisition import Acquisition, Echo
from qsm_deploy.runtime.dicom.frames import Headers
from qsm_deploy.runtime.dicom.headers import Role
from qsm_deploy.runtime.dicom.series import OTHERS, Series, series_of
from qsm_deploy.runtime.dicom.stacks import require_same_slices, stacks_of

LISTED = 6  # series in a message


def list_series(headers: Headers, folder: Path) -> str:
    """Return a line for every series of a folder: what it is, and whether a map can be made of it.

    Raises
    ------
    DataError
        If it holds no MR image.
    """
    _require_images(headers, folder)
    lines = []
    studies = dict.fromkeys(frame.study for frame in headers.frames)
    for number, study in enumerate(studies, 1):
        every = series_of(frame for frame in headers.frames if frame.study == study)
        lines += [f"study {number} of {len(studies)}:"] * (len(studies) > 1)
        lines += [f"{series}: {series.summary}{_verdict(series, every)}" for series in every]
    return "\n".join(lines)


def acquisition_of(headers: Headers, folder: Path, numbers: Sequence[int] = ()) -> Acquisition:
    """Return what a map is made of.

    Parameters
    ----------
    headers
        Of the files in a folder.
    folder
        For messages.
    numbers
        The series to take: that of the phase, or one of each echo, and that of its magnitude
        where several could be.

    Raises
    ------
    DataError
        If there is nothing, several would do, or something is missing or contradicts the rest.
    """
    _require_images(headers, folder)
    _require_one_study(headers, folder)
    every = series_of(headers.frames)
    known = {series.number for series in every}
    if unknown := [n for n in numbers if n not in known]:
        raise DataError(f"{folder}: no series {unknown[0]}; it holds {_listed(every)}")
    asked = [series for series in every if not numbers or series.number in numbers]
    leading = [series for series in asked if series.leads]
    against = {s: s.kind or (None if numbers else s.doubt) for s in leading}
    usable = [series for series in leading if against[series] is None]
    if not leading:
        where = f"{folder}: " + ("the series asked for have" if numbers else "there are")
        raise DataError(
            f"{where} no phase images, and no real and imaginary ones; it holds {_listed(every)}"
        )
    kept, named = ({series.number for series in some} for some in (usable, leading))
    if not usable or (numbers and kept != named):  # none that was named is left out
        reasons = "; ".join(f"{s} {why}" for s, why in [*against.items()][:LISTED] if why)
        raise DataError(f"{folder}: {reasons}")
    if numbers:
        return _acquisition_named(asked, usable, every, numbers)
    usable = [s for s in usable if not _is_difference(s, usable, every)] or usable
    if len(usable) > 1:
        raise DataError(
            f"{folder}: {len(usable)} series have a phase: {_listed(usable)}; pass --series NUMBER "
            "with the one to take"
        )
    return _acquisition(usable[0], every, ())


def _acquisition_named(
    asked: Sequence[Series], usable: Sequence[Series], every: Sequence[Series], named: Sequence[int]
) -> Acquisition:
    """Return what is made of series that the user named, of each of them."""
    if len(usable) > 1:  # one for each echo, as some scanners have it
        frames = (frame for series in asked if series.kind is None for frame in series.frames)
        made = _acquisition(Series(tuple(frames)), every, named)
    else:
        made = _acquisition(usable[0], every, named)
    taken = {frame.series_number for frame in made.frames}
    if left := [series for series in asked if series.number not in taken]:
        raise DataError(
            f"{left[0]} does not fit {usable[0]}: it has other echoes, another place, size or "
            f"correction, or neither role ({left[0].summary}); drop it"
        )
    return made


def _is_difference(series: Series, usable: Sequence[Series], every: Sequence[Series]) -> bool:
    """Return whether a phase is that of a field map: alone, and later than its magnitude begins."""

    def starts(of: Series, role: Role) -> float:
        return min((f.echo_time_s for f in of.of(role) if f.echo_time_s), default=0)

    acquired = {frame.acquired for frame in series.frames}
    beside = [o for o in every if acquired & {frame.acquired for frame in o.frames}]
    return not any(o is not series and o in beside for o in usable) and any(
        0 < starts(o, "magnitude") < starts(series, "phase") for o in beside
    )


def _acquisition(series: Series, every: Sequence[Series], numbers: Sequence[int]) -> Acquisition:
    """Return what is made of a series and, if it is one of phase only, of its magnitude."""
    lead = series.leads
    assert lead is not None  # it was chosen for that
    other = OTHERS[lead]
    first = stacks_of(series.of(lead), f"{series}, {lead}")
    partner = _partner(series, other, every, numbers)
    if partner is None and lead == "real":
        raise DataError(f"{series} has real parts, and there are no imaginary ones; export both")
    if partner is None:
        return Acquisition(tuple(Echo(time, images, ()) for time, images in first), False)
    second = stacks_of(partner.of(other), f"{partner}, {other}")
    require_same_slices(first, second, f"{series}, {lead}", f"{partner}, {other}")
    echoes = (
        Echo(time, images, others)
        for (time, images), (_, others) in zip(first, second, strict=True)
    )
    return Acquisition(tuple(echoes), lead == "real")


def _partner(
    series: Series, role: Role, every: Sequence[Series], numbers: Sequence[int]
) -> Series | None:
    """Return the series with the other images of the same acquisition, if there is one."""
    if series.roles[role]:
        return series
    lead = series.frames[0]
    acquired = {frame.acquired for frame in series.frames}
    times = {frame.echo_time_s for frame in series.frames}
    fitting = [
        other
        for other in every
        if other.roles[role]
        and other.kind is None
        and other.frames[0].frame_of_reference == lead.frame_of_reference
        and other.frames[0].shape == lead.shape
        and times & {frame.echo_time_s for frame in other.of(role)}
    ]
    alike = [other for other in fitting if other.corrections == series.corrections]
    # not that of a sum of echoes, unless there is no other
    alike = [o for o in alike if times <= {frame.echo_time_s for frame in o.of(role)}] or alike
    if fitting and not alike:
        how, theirs = (" ".join(sorted(s.corrections)) or "not said" for s in (series, fitting[0]))
        raise DataError(
            f"{series} and {fitting[0]} were corrected for the gradients in two ways ({how} and "
            f"{theirs}); export phase and {role} alike"
        )
    named = [other for other in alike if other.number in numbers]
    together = [o for o in alike if acquired & {frame.acquired for frame in o.frames}]
    for chosen in (named, together, alike):
        if len(chosen) == 1:
            return chosen[0]
    if alike:
        raise DataError(
            f"{series}: {len(alike)} series could be its {role}: {_listed(alike)}; pass --series "
            f"{series.number} NUMBER with that of the {role}"
        )
    return None


def _require_images(headers: Headers, folder: Path) -> None:
    if not headers.frames:
        raise DataError(f"{folder}: no MR image in DICOM among its {headers.others} files")


def _require_one_study(headers: Headers, folder: Path) -> None:
    """Refuse images of several studies or patients; names are not shown."""
    for what, found in (
        ("studies", Counter(frame.study for frame in headers.frames)),
        ("patients", Counter(frame.patient for frame in headers.frames)),
    ):
        if len(found) > 1:
            counts = " and ".join(str(count) for _, count in found.most_common())
            raise DataError(f"{folder}: images of {len(found)} {what} ({counts}); pass one alone")


def _verdict(series: Series, every: Sequence[Series]) -> str:
    if series.leads is None and series.kind is None:
        return ""
    if why := series.kind or series.doubt:
        return f" - {why}"
    try:
        made = _acquisition(series, every, ())
    except DataError as error:
        return f" - {error}"
    return f" - a map can be made of it: {len(made.echoes)} echoes of {len(made.slices)} slices" + (
        "" if made.echoes[0].second else ", with a mask (it has no magnitude)"
    )


def _listed(every: Sequence[Series]) -> str:
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(map(str, every[:LISTED])) + more
