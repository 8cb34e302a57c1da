"""The series of a study: what each holds, and whether a map can be made of its kind."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from qsm_deploy.runtime.dicom.headers import Frame, Role

CORRECTIONS = {"ND", "DIS2D", "DIS3D"}  # of the gradients' distortion: none, in a plane, in space
OTHERS: dict[Role, Role] = {"phase": "magnitude", "real": "imaginary"}
# what a series says that is filtered or projected, and one that may be: by its name, or that of its
# sequence, such as *swi3d1r
FILTERED = re.compile(
    r"(?<![a-z])(mip|mnip|minip|filt|filtered)(?![a-z])|pha_?images", re.IGNORECASE
)
WEIGHTED = re.compile(r"(?<![a-z])(swi|swan|swip)(?![a-z])", re.IGNORECASE)
VELOCITIES = re.compile(r"_v\d")  # of Siemens' sequences of flow, such as *fl3d1_v150in


@dataclass(frozen=True)
class Series:
    """The frames of one series."""

    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        about = f" ({text})" if (text := self.description) else ""
        return f"series {self.number}{about}"

    @property
    def number(self) -> int:
        """Of the series."""
        return self.frames[0].series_number

    @property
    def description(self) -> str:
        """What the scanner's user called it, in printable characters."""
        return "".join(c if c.isprintable() else "?" for c in self.frames[0].description)[:64]

    @cached_property
    def roles(self) -> Counter[Role]:
        """How many images it has of each role."""
        return Counter(frame.role for frame in self.frames if frame.role)

    @property
    def leads(self) -> Role | None:
        """What a map can begin with: its phase, or its real parts; ``None`` if it has neither."""
        lead: Role
        for lead in OTHERS:
            if self.roles[lead]:
                return lead
        return None

    def of(self, role: Role) -> tuple[Frame, ...]:
        """Return the frames of a role."""
        return tuple(frame for frame in self.frames if frame.role == role)

    @cached_property
    def corrections(self) -> frozenset[str]:
        """How its images were corrected for the gradients."""
        return frozenset(CORRECTIONS.intersection(self.frames[0].image_type))

    @property
    def kind(self) -> str | None:
        """Why no map can be made of such a series, if so."""
        frame, *_ = frames = self.of(self.leads) if self.leads else self.frames
        words = {word for each in frames for word in each.image_type}
        if "DERIVED" in words:
            return "is derived (ImageType), not what was measured"
        if any(map(FILTERED.search, (*words, frame.description))) or any(
            map(WEIGHTED.search, words)
        ):
            return (
                "is filtered or projected, as susceptibility-weighted images are; a map needs the "
                "phase before that"
            )
        velocities = VELOCITIES.search(frame.sequence_name)
        if velocities or any(word.startswith("VELOCITY") for word in words):
            return "is one of velocities, not of susceptibility"
        if frame.sequence and not {"GR", "RM"} & {*frame.sequence}:
            return f"is no gradient echo (its sequence is {' '.join(frame.sequence)})"
        return None

    @property
    def doubt(self) -> str | None:
        """What speaks against its phase by a name alone, if so; whoever names the series knows."""
        if any(map(WEIGHTED.search, (self.description, self.frames[0].sequence_name))):
            return (
                "is called susceptibility-weighted, and the phase of such is filtered; if this one "
                f"is not, pass --series {self.number}"
            )
        return None

    @property
    def summary(self) -> str:
        """What it holds, in a line."""
        held = ", ".join(f"{count} {role}" for role, count in sorted(self.roles.items()))
        times = sorted({round(f.echo_time_s * 1e6) for f in self.frames if f.echo_time_s})
        echoes = (
            f"echoes {', '.join(f'{t / 1e3:g}' for t in times)} ms" if times else "no echo time"
        )
        files, images = len({frame.path for frame in self.frames}), len(self.frames)
        return "; ".join((_count(files, "file"), held or _count(images, "image"), echoes))


def series_of(frames: Iterable[Frame]) -> list[Series]:
    """Return the series by number, as they were sent."""
    found: dict[str, list[Frame]] = defaultdict(list)
    for frame in frames:
        found[frame.series].append(frame)
    return sorted((Series(tuple(held)) for held in found.values()), key=lambda s: s.number)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
