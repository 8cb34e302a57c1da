"""The images of one recording in a BIDS dataset, and what each is for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.scan.nifti import on_grid

Source = Literal["localfield", "megre"]
# BIDS has no name for a local field: SEPIA and QSM-CI, BIDS with an entity, qsm-forward
LOCAL_FIELDS = ("localfield", "fieldmap-local")
LOCAL_FIELDMAP = ("fieldmap", "local")
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
    def is_phase(self) -> bool:
        """Whether it is the phase of one echo of a multi-echo GRE."""
        return self.suffix == "MEGRE" and self.entities.get("part") == "phase"


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

    def local_field(self) -> BidsImage:
        """Return its local field.

        Raises
        ------
        DataError
            If there are several.
        """
        return _only([image for image in self.images if image.is_local_field], "local field")

    def echoes(self) -> list[tuple[BidsImage, BidsImage]]:
        """Return phase and magnitude of every echo, in order.

        Raises
        ------
        DataError
            If an echo is missing, there twice, or lacks its magnitude.
        """
        phases = _by_echo([image for image in self.images if image.is_phase])
        magnitudes = _by_echo(
            [i for i in self.images if i.suffix == "MEGRE" and i.entities.get("part") == "mag"]
        )
        if sorted(phases) != list(range(1, len(phases) + 1)):
            raise DataError(
                f"echoes {', '.join(map(str, sorted(phases)))} have a phase; they must count from "
                "1 without gaps"
            )
        if lacking := sorted(phases.keys() - magnitudes.keys()):
            raise DataError(
                f"echo {lacking[0]} has a phase but no magnitude (part-mag); add it beside "
                f"{phases[lacking[0]].path.name}"
            )
        return [(phases[echo], magnitudes[echo]) for echo in sorted(phases)]

    def mask(self, measured: BidsImage) -> Path | None:
        """Return the mask that fits best, if there is one.

        Those of the dataset that the measurement lies in come before those of other derivatives,
        which count only if they lie on its grid; those that say more of the recording come before
        those of its whole session or subject.

        Raises
        ------
        DataError
            If several fit equally well.
        """
        masks = [
            image
            for image in self.images
            if image.suffix == "mask"
            and (image.root == measured.root or on_grid(image.path, measured.path))
        ]
        best = max((_fit(mask, measured) for mask in masks), default=None)
        fitting = [mask for mask in masks if _fit(mask, measured) == best]
        return _only(fitting, "mask").path if fitting else None


def _by_echo(images: list[BidsImage]) -> dict[int, BidsImage]:
    found: dict[int, BidsImage] = {}
    for image in images:
        echo = image.entities.get("echo", "")
        if not echo.isdecimal():
            raise DataError(
                f"{image.path.name} says no echo number; MEGRE needs echo-1, echo-2 ..."
            )
        if int(echo) in found:
            raise DataError(
                f"echo {int(echo)} is there twice: {found[int(echo)].path} and {image.path}; "
                "remove one"
            )
        found[int(echo)] = image
    return found


def _fit(mask: BidsImage, measured: BidsImage) -> tuple[bool, int]:
    return mask.root == measured.root, len(mask.recording)


def _only(images: list[BidsImage], what: str) -> BidsImage:
    if len(images) != 1:
        seen = " and ".join(str(image.path) for image in images[:2])
        raise DataError(f"{len(images)} images fit as {what}: {seen}; keep one")
    return images[0]
