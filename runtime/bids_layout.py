"""Which recordings a BIDS dataset holds: local field maps and multi-echo GRE, by their names.

Only names are read here; what is in the files is judged when a recording is run, so that one bad
recording does not stop the others.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.nifti import on_grid
from qsm_deploy.runtime.params import load_json_object

Source = Literal["localfield", "megre"]
DESCRIPTION = "dataset_description.json"
IMAGE = re.compile(
    r"(?P<entities>(?:[a-z0-9]+-[A-Za-z0-9+]+_)+)(?P<suffix>[A-Za-z0-9-]+)\.nii(?:\.gz)?"
)
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


def find_recordings(
    dataset: Path, labels: Iterable[str] | None, source: Source | None, ours: Path
) -> list[Recording]:
    """Return the recordings of a dataset, by subject.

    Local fields and masks are looked for in the dataset and in its ``derivatives/*``, raw data in
    the dataset itself. A recording that has a local field begins with that.

    Parameters
    ----------
    dataset
        A folder with a ``dataset_description.json``.
    labels
        Participants to take, with or without ``sub-``; ``None`` takes all.
    source
        What every recording is to begin with; ``None`` takes what there is.
    ours
        The derivative dataset that is written, which is not read.

    Raises
    ------
    DataError
        If it is no BIDS dataset, or holds nothing to reconstruct.
    UsageError
        If a participant is not in it.
    """
    _require_dataset(dataset)
    derivatives = dataset / "derivatives"
    roots = [dataset]
    if derivatives.is_dir():
        roots += [d for d in sorted(derivatives.iterdir()) if d.is_dir() and d != ours]
    known = sorted({d.name for root in roots for d in root.glob("sub-*") if d.is_dir()})
    wanted = known if labels is None else _participants(labels, known, dataset)
    recordings = [
        recording
        for subject in wanted
        for recording in _recordings([i for root in roots for i in _images(root, subject)], source)
    ]
    if not recordings:
        what = {
            None: "local field (_localfield, _desc-local_fieldmap) nor part-phase MEGRE",
            "localfield": "local field (_localfield, _desc-local_fieldmap)",
            "megre": "part-phase MEGRE",
        }[source]
        raise DataError(
            f"{dataset}: no {what} in {_some(wanted)}; expected for example "
            "sub-01/anat/sub-01_echo-1_part-phase_MEGRE.nii.gz"
        )
    return recordings


def without_recording(recordings: list[Recording], labels: Iterable[str]) -> list[str]:
    """Return the participants that were asked for and have no recording."""
    have = {recording.entities[0][1] for recording in recordings}
    return sorted({label.removeprefix("sub-") for label in labels} - have)


def _recordings(images: list[BidsImage], source: Source | None) -> Iterator[Recording]:
    """Yield the recordings among one subject's images, with their masks."""
    groups: dict[tuple[tuple[str, str], ...], list[BidsImage]] = defaultdict(list)
    for image in images:
        groups[image.recording].append(image)
    masks = [image for image in images if image.suffix == "mask"]
    for entities, members in sorted(groups.items()):
        kinds: list[Source] = []
        if any(image.is_local_field for image in members):
            kinds.append("localfield")
        if any(image.is_phase for image in members):
            kinds.append("megre")
        chosen = source if source in kinds else (kinds[0] if kinds and source is None else None)
        if chosen is not None:
            fitting = [m for m in masks if dict(m.recording).items() <= dict(entities).items()]
            others = [image for image in members if image.suffix != "mask"]
            yield Recording(entities, chosen, (*others, *fitting))


def _images(root: Path, subject: str) -> Iterator[BidsImage]:
    for pattern in ("anat/*", "fmap/*", "ses-*/anat/*", "ses-*/fmap/*"):
        for path in sorted((root / subject).glob(pattern)):
            match = IMAGE.fullmatch(path.name)
            if match is None:
                continue
            pairs = [pair.split("-", 1) for pair in match["entities"].rstrip("_").split("_")]
            yield BidsImage(path, root, {key: value for key, value in pairs}, match["suffix"])


def _require_dataset(dataset: Path) -> None:
    if not dataset.is_dir():
        raise DataError(f"{dataset}: no such folder; pass the root of a BIDS dataset")
    if not (dataset / DESCRIPTION).is_file():
        raise DataError(
            f"{dataset}: no BIDS dataset, it has no {DESCRIPTION}; pass the folder that holds it"
        )
    description = load_json_object(dataset / DESCRIPTION)
    if lacking := {"Name", "BIDSVersion"} - description.keys():
        raise DataError(f"{dataset / DESCRIPTION}: lacks {min(lacking)}, which BIDS requires")


def _participants(labels: Iterable[str], known: list[str], dataset: Path) -> list[str]:
    wanted = sorted({f"sub-{label.removeprefix('sub-')}" for label in labels})
    if strange := [name for name in wanted if name not in known]:
        model = strange[0].endswith((".onnx", ".plan"))
        hint = "; name the model before --participant-label" if model else ""
        raise UsageError(f"{dataset} has no {strange[0]}; it has {_some(known)}{hint}")
    return wanted


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


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "no subject"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
