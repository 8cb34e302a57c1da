"""Where a run begins, and which maps on the way are read or kept.

Of the phase, a total field and a local field the first that is given is where it begins; those
after it are made, and kept where a file is named for them. What a field fit tells besides, the
noise map, the quality and R2*, is made with it, and read where it was made before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from qsm_deploy.kernels.errors import UsageError

if TYPE_CHECKING:
    from qsm_deploy.runtime.local_field.echo_images import EchoImages
    from qsm_deploy.runtime.local_field.from_echoes import Steps

Until = Literal["total-field", "local-field", "chi"]


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes
    ----------
    fields
        The files that it begins with: local fields, a total field, or the phase of echoes.
    images
        The echoes, if it begins with them.
    noise_map, quality
        Files that are read.
    keeps
        Where maps go that are made on the way, by the name of their flag.
    steps
        How the local field is made; ``None`` if it begins with one.
    until
        The last map that is made.
    """

    fields: tuple[Path, ...] = ()
    images: "EchoImages | None" = None
    noise_map: Path | None = None
    quality: Path | None = None
    keeps: dict[str, Path] = field(default_factory=dict)
    steps: "Steps | None" = None
    until: Until = "chi"

    @property
    def reads(self) -> tuple[Path, ...]:
        """All files but mask and magnitude that are read for the field."""
        besides = (self.noise_map, self.quality)
        return (*self.fields, *(path for path in besides if path is not None))


def beginning_of(
    fields: Sequence[Path],
    *,
    phase: Sequence[Path] = (),
    magnitude: Sequence[Path] = (),
    are_parts: bool = False,
    total_field: Path | None = None,
    local_field: Path | None = None,
    noise_map: Path | None = None,
    quality: Path | None = None,
    r2star: Path | None = None,
    brain_mask: Path | None = None,
    background_removal: str | None = None,
    erode: float | None = None,
    until: Until = "chi",
    of_a_map: Mapping[str, object] = MappingProxyType({}),
) -> Beginning:
    """Return where a run begins, by the names of the command line's flags.

    Where ``are_parts``, phase and magnitude are real and imaginary parts. What is said of a map,
    ``of_a_map``, has no meaning where none is made.

    Raises
    ------
    UsageError
        If flags contradict each other, or say something of steps that are not taken.
    DataError
        If a sidecar of the echoes cannot be read.
    """
    if until not in get_args(Until):
        raise UsageError(f"until is {until!r}, expected one of {', '.join(get_args(Until))}")
    named = {"--phase": tuple(phase), "--total-field": total_field, "FIELD": tuple(fields)}
    starts = [name for name, given in named.items() if given]
    if fields and len(starts) > 1:
        raise UsageError(
            f"{fields[0]} is a local field already, which {starts[0]} begins before; drop one, or "
            "name the model before the flags if it is one"
        )
    if not phase:
        made = {"r2star": r2star, "brain-mask": brain_mask}
        _refuse(made, "is made of echoes; add --phase and --magnitude")
    if not (phase or total_field):
        steps = {"quality": quality, "background-removal": background_removal, "erode": erode}
        steps["until"] = None if until == "chi" else until
        _refuse(steps, "is for a run that begins with --phase or --total-field")
        if fields and local_field is not None:
            raise UsageError(
                f"{fields[0]} and --local-field {local_field} are both given; keep one"
            )
        begins = tuple(fields) or (() if local_field is None else (local_field,))
        return Beginning(begins, noise_map=noise_map)
    made = {"local_field": local_field}
    if phase:
        made |= {"total_field": total_field, "noise_map": noise_map, "quality": quality}
        made |= {"r2star": r2star, "brain_mask": brain_mask}
    keeps = {name: path for name, path in made.items() if path is not None}
    last = until.replace("-", "_")
    if last == "total_field" and not phase:
        raise UsageError("--until total-field needs --phase: the total field is given")
    if last != "chi" and last not in keeps:
        raise UsageError(f"--until {until} writes no other map: name its file with --{until} FILE")
    if last == "total_field" and "local_field" in keeps:
        raise UsageError("--local-field is made after --until total-field; drop one")
    for name, given in of_a_map.items():
        if last != "chi" and given:
            raise UsageError(f"--{name} is of a map, which --until {until} does not make; drop one")
    steps_ = steps_from(background_removal, erode)
    if not phase and total_field is not None:
        return Beginning((total_field,), None, noise_map, quality, keeps, steps_, until)
    from qsm_deploy.runtime.local_field.echo_images import EchoImages, images_with_sidecars

    images = EchoImages(images_with_sidecars(phase), images_with_sidecars(magnitude), are_parts)
    return Beginning(tuple(phase), images, keeps=keeps, steps=steps_, until=until)


def steps_from(background_removal: str | None, erode: float | None) -> "Steps":
    """Return how a local field is made.

    Parameters
    ----------
    background_removal
        The method's name.
    erode
        What the mask loses at its edge [mm].

    Raises
    ------
    UsageError
        If there is no such method, or no mask would be left.
    """
    from qsm_deploy.runtime.local_field.background.methods import REMOVALS
    from qsm_deploy.runtime.local_field.background.two_prior import BEYOND_MM, TwoPrior
    from qsm_deploy.runtime.local_field.from_echoes import STEPS

    changed: dict[str, Any] = {}
    if background_removal is not None:
        if background_removal not in REMOVALS:
            raise UsageError(
                f"no background removal {background_removal!r}; there are {', '.join(REMOVALS)}"
            )
        changed["remove"] = REMOVALS[background_removal]
    if erode is not None:
        if not 0 <= erode <= 49:
            raise UsageError(f"--erode {erode:g}: pass 0 to 49 mm")
        changed["quality"] = replace(STEPS.quality, erosion_mm=erode)
        remove = changed.get("remove", STEPS.remove)
        if isinstance(remove, TwoPrior):  # there is brain where the mask was
            changed["remove"] = replace(remove, rim_mm=erode + (erode > 0) * BEYOND_MM)
    return replace(STEPS, **changed)


def _refuse(flags: dict[str, Any], why: str) -> None:
    """Refuse flags that are given."""
    for name, value in flags.items():
        if value is not None:
            raise UsageError(f"--{name} {why}")
