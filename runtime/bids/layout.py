"""The images of one recording in a BIDS dataset, and what each is for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.inputs import require_files
from qsm_deploy.runtime.scan.nifti import on_grid

Source = Literal["localfield", "megre"]
# BIDS has no name for a local field: SEPIA and QSM-CI, BIDS with an entity, qsm-forward
LOCAL_FIELDS = ("localfield", "fieldmap-local")
LOCAL_FIELDMAP = ("fieldmap", "local")
# a gradient echo, complex by the entity part; older drafts say it in the suffix
GRADIENT_ECHOES = ("MEGRE", "GRE", "T2starw")
PART_OF_SUFFIX = {"phase": "phase", "magnitude": "mag"}
# what makes a recording, in order of preference
PARTS = (("phase", "mag"), ("real", "imag"))
COMPLEX = ("phase", "real", "imag")
KNOWN_PARTS = (*COMPLEX, "mag")
# what may belong to several recordings: those that have its pairs
SHARED = ("mask", "dseg")
# what tells files of one recording apart
WITHIN = ("echo", "part", "desc")


@dataclass(frozen=True)
class BidsImage:
    """One image of a dataset, taken apart.

    Attributes
    ----------
    path
        The file.
    root
        The dataset that it belongs to: the raw one or a derivative.
    entities
        The key-value pairs of its name, in order.
    suffix
        What the name ends in, such as ``MEGRE``.
    """

    path: Path
    root: Path
    entities: dict[str, str]
    suffix: str

    @property
    def recording(self) -> tuple[tuple[str, str], ...]:
        """The pairs that the files of one recording share."""
        return tuple((k, v) for k, v in self.entities.items() if k not in WITHIN)

    @property
    def is_local_field(self) -> bool:
        """Whether it is a field map without background."""
        described = (self.suffix, self.entities.get("desc"))
        return self.suffix in LOCAL_FIELDS or described == LOCAL_FIELDMAP

    @property
    def part(self) -> str | None:
        """What it is of a complex gradient echo: ``phase``, ``mag``, ``real`` or ``imag``.

        An image that does not say is a magnitude; ``None`` is no gradient echo.
        """
        if self.suffix in GRADIENT_ECHOES:
            return self.entities.get("part", "mag")
        return PART_OF_SUFFIX.get(self.suffix)

    @property
    def sequence(self) -> str:
        """The suffix that it shares with the other parts of its recording."""
        return "phase" if self.suffix in PART_OF_SUFFIX else self.suffix


@dataclass(frozen=True)
class Recording:
    """What one susceptibility map is made of.

    Attributes
    ----------
    entities
        The pairs that all its files share, subject first.
    source
        What the reconstruction begins with.
    images
        Every image with these pairs, in the datasets that were looked at.
    """

    entities: tuple[tuple[str, str], ...]
    source: Source
    images: tuple[BidsImage, ...]

    @property
    def name(self) -> str:
        """The shared part of its names, such as ``sub-01_ses-a_run-2``."""
        return "_".join(f"{key}-{value}" for key, value in self.entities)

    @property
    def folder(self) -> Path:
        """Where its map belongs in a derivative dataset."""
        above = [f"{key}-{value}" for key, value in self.entities if key in ("sub", "ses")]
        return Path(*above, "anat")

    def require_one(self) -> None:
        """Check by their names that its images make one recording.

        Raises
        ------
        DataError
            As :meth:`local_field` or :meth:`echoes`.
        """
        if self.source == "localfield":
            self.local_field()
        else:
            self.echoes()

    def local_field(self) -> BidsImage:
        """Return its local field.

        Raises
        ------
        DataError
            If there are several.
        """
        return _only([image for image in self.images if image.is_local_field], "local field")

    def echoes(self) -> list[tuple[BidsImage, BidsImage]]:
        """Return phase and magnitude of every echo in order, or else real and imaginary part.

        Raises
        ------
        DataError
            If an echo is missing, there twice, or lacks its other part, or two sequences would
            become one map.
        """
        leading = {image.sequence: image for image in self.images if image.part in COMPLEX}
        if len(leading) > 1:
            first, second, *_ = leading.values()
            raise DataError(
                f"{first.path} and {second.path} would both become the map of {self.name}; keep "
                "one, or tell them apart by acq-"
            )
        images = [image for image in self.images if image.sequence in leading]
        found = {part: _by_echo(images, part) for pair in PARTS for part in pair}
        there = {echo: image for part in COMPLEX for echo, image in found[part].items()}
        echoes = sorted(there)
        if echoes != list(range(1, len(echoes) + 1)):
            raise DataError(
                f"echoes {', '.join(map(str, echoes))} have a phase; they must count from 1 "
                "without gaps"
            )
        lacking = [
            [(part, echo) for part in pair for echo in echoes if echo not in found[part]]
            for pair in PARTS
        ]
        for pair, nothing in zip(PARTS, lacking, strict=True):
            if not nothing:
                return [(found[pair[0]][echo], found[pair[1]][echo]) for echo in echoes]
        part, echo = lacking[0 if found["phase"] else 1][0]
        raise DataError(f"echo {echo} has no part-{part}; add it beside {there[echo].path.name}")

    def left_over(self) -> list[str]:
        """Return a note on real and imaginary parts that phase and magnitude are taken before."""
        parts = [image.path.name for image in self.images if image.part in PARTS[1]]
        if not parts or self.echoes()[0][0].part in PARTS[1]:
            return []
        return [f"taking phase and magnitude, not the real and imaginary parts ({parts[0]} ...)"]

    def unused_masks(self, measured: BidsImage) -> list[str]:
        """Return a note on masks that are there, where none lies on a measurement's grid."""
        masks = [image.path.name for image in self.images if image.suffix == "mask"][:1]
        return [
            f"{name} lies on another grid than {measured.path.name}, and is not used"
            for name in masks
        ]

    def mask(self, measured: BidsImage) -> Path | None:
        """Return the mask that fits best, if there is one.

        Those of the dataset that the measurement lies in come before those of other derivatives,
        which count only if they lie on its grid; those that say more of the recording come before
        those of its whole session or subject.

        Raises
        ------
        DataError
            If several fit equally well, or one of another derivative cannot be read.
        """
        masks = [image for image in self.images if image.suffix == "mask"]
        if near := [mask for mask in masks if mask.root == measured.root]:
            masks = near
        else:
            for path in (mask.path for mask in masks):
                require_files([path], "mask")
                if not on_grid(path, path):
                    raise DataError(f"{path}: this mask cannot be read; repair or remove it")
            masks = [mask for mask in masks if on_grid(mask.path, measured.path)]
        most = max((len(mask.recording) for mask in masks), default=0)
        fitting = [mask for mask in masks if len(mask.recording) == most]
        return _only(fitting, "mask").path if fitting else None


def _by_echo(images: list[BidsImage], part: str) -> dict[int, BidsImage]:
    """Return the images of one part by the number of their echo; a single one needs none."""
    images = [image for image in images if image.part == part]
    images = [image for image in images if "part" in image.entities] or images
    found: dict[int, BidsImage] = {}
    for image in images:
        echo = image.entities.get("echo", "1" if len(images) == 1 else "")
        if not echo.isdecimal():
            other = next(i for i in images if i is not image)
            raise DataError(
                f"{image.path.name} says no echo number beside {other.path.name}; name them "
                "echo-1, echo-2 ... or keep one"
            )
        if int(echo) in found:
            raise DataError(
                f"echo {int(echo)} is there twice: {found[int(echo)].path} and {image.path}; "
                "remove one"
            )
        found[int(echo)] = image
    return found


def _only(images: list[BidsImage], what: str) -> BidsImage:
    if len(images) != 1:
        seen = " and ".join(str(image.path) for image in images[:2])
        raise DataError(f"{len(images)} images fit as {what}: {seen}; keep one")
    return images[0]
