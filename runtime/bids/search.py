"""Which recordings a BIDS dataset holds: local field maps and multi-echo GRE, by their names.

Only names are read here; what is in the files is judged when a recording is run, so that one bad
recording does not stop the others.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.bids.layout import (
    COMPLEX,
    GRADIENT_ECHOES,
    KNOWN_PARTS,
    SHARED,
    BidsImage,
    Recording,
    Source,
)
from qsm_deploy.runtime.console.inputs import require_files
from qsm_deploy.runtime.scan.params import load_json_object

DESCRIPTION = "dataset_description.json"
FOLDERS = ("anat", "fmap", "swi")
# of other measurements, which nobody puts a gradient echo in
OTHER_FOLDERS = (
    *("beh", "dwi", "eeg", "func", "ieeg", "meg"),
    *("micr", "motion", "mrs", "nirs", "perf", "pet"),
)
IMAGE = re.compile(
    r"(?P<entities>sub-[A-Za-z0-9+]+_(?:[a-z0-9]+-[A-Za-z0-9+]+_)*)(?P<suffix>[A-Za-z0-9-]+)"
    r"\.nii(?:\.gz)?"
)
EXAMPLE = "sub-01_echo-1_part-phase_MEGRE.nii.gz"
NO_PHASE = "which needs its part-phase, or part-real and part-imag, beside it"
FIELD_MAPS = ("phase1", "phase2", "phasediff")
OF_A_FIELD_MAP = "which is of a field map; gradient echoes are needed, _MEGRE"
NO_SEQUENCE = (
    f"which needs part-phase, part-real or part-imag and one of {', '.join(GRADIENT_ECHOES)}"
)
NO_MASK = "which needs the suffix mask"
NO_NAME = f"which needs a name of BIDS, such as {EXAMPLE}"
NOT_SEARCHED = f"which needs to lie in {', '.join(FOLDERS[:-1])} or {FOLDERS[-1]}"
EMPTY = "which is empty; a subdataset of DataLad comes with: datalad get"
OF_FILES = (".nii", ".gz", ".json", ".tsv")
# like the name of what is looked for
SOUNDS = re.compile(
    r"_part-(?!mag_)|_(phase|real|imag)|phase[0-9]*\.nii|mask\.nii|_(megre|gre|t2star.*)\.nii"
    r"|(localfield|fieldmap-local|local_fieldmap)\.nii",
    re.I,
)


@dataclass(frozen=True)
class Found:
    """What a dataset holds.

    Attributes
    ----------
    recordings
        What can be reconstructed, by subject.
    failures
        Why others cannot be, by the name of the recording, the subject or the folder.
    unused
        Names of empty folders, and of images that sound like gradient echoes or local fields and
        belong to none, by what they need.
    """

    recordings: list[Recording] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def notes(self, about: str = "") -> list[str]:
        """Return a line for every need of what is not used, where a pattern is in its name."""
        lines = []
        for need, names in self.unused.items():
            if those := [name for name in names if re.search(about, name)]:
                lines.append(f"found and not used: {_some(those)}, {need}")
        return lines


def find_recordings(
    dataset: Path,
    labels: Iterable[str] | None,
    source: Source | None,
    ours: Path,
    has: Callable[[str], bool] | None = None,
) -> Found:
    """Return the recordings of a dataset, by subject.

    Local fields and masks are looked for in the dataset and in its ``derivatives/*``, raw data in
    the dataset itself. A recording that has a local field begins with that. A folder that cannot
    be read, an image under another subject's or session's name, and images that do not make one
    recording are failures of their subject or recording alone.

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
    has
        Whether a subject, by its label, is in the part that is wanted, which may be empty; the
        folders of others are not opened.

    Raises
    ------
    DataError
        If it is no BIDS dataset, or holds nothing to reconstruct.
    UsageError
        If a participant is not in it.
    """
    _require_dataset(dataset)
    found = Found()
    known: dict[str, list[Path]] = defaultdict(list)  # where each subject has a folder
    for root in (dataset, *_derivatives(dataset, ours, found)):
        try:
            for path in _entries(root, found):
                if path.name.startswith("sub-") and not ("." in path.name and path.is_file()):
                    known[path.name].append(root)
        except DataError as error:
            found.failures[root.name] = str(error)
    wanted = sorted(known) if labels is None else _participants(labels, sorted(known), dataset)
    if has is not None:
        wanted = [name for name in wanted if has(name.removeprefix("sub-"))]
    for subject in wanted:
        try:
            roots = [root for root in known[subject] if not os.path.isfile(root / subject)]
            images = [image for root in roots for image in _images(root, subject, found)]
        except DataError as error:
            found.failures[subject] = str(error)
            continue
        for recording in _recordings(images, source, found):
            try:
                recording.require_one()
                found.recordings.append(recording)
            except DataError as error:
                found.failures[recording.name] = str(error)
    if not (found.recordings or found.failures or has):
        what = {
            None: "local field (_localfield, _desc-local_fieldmap) nor part-phase MEGRE",
            "localfield": "local field (_localfield, _desc-local_fieldmap)",
            "megre": "part-phase MEGRE",
        }[source]
        raise DataError(
            f"{dataset}: no {what} in {_some(wanted)}; expected for example sub-01/anat/{EXAMPLE}"
            + "".join(f"; {line}" for line in found.notes())
        )
    return found


def without_recording(found: Found, labels: Iterable[str]) -> dict[str, str]:
    """Return the participants that were asked for and have no recording, and why."""
    have = {recording.entities[0][1] for recording in found.recordings}
    have |= {name.split("_")[0].removeprefix("sub-") for name in found.failures}
    lacking = sorted({label.removeprefix("sub-") for label in labels} - have)
    reason = "neither a local field nor part-phase MEGRE to begin with"
    return {
        label: "; ".join([reason, *found.notes(rf"sub-{re.escape(label)}(\b|_)")])
        for label in lacking
    }


def _recordings(
    images: list[BidsImage], source: Source | None, found: Found
) -> Iterator[Recording]:
    """Yield the recordings among one subject's images, with their masks."""
    groups: dict[tuple[tuple[str, str], ...], list[BidsImage]] = defaultdict(list)
    for image in images:
        groups[image.recording].append(image)
    shared = [image for image in images if image.suffix in SHARED]
    for entities, members in sorted(groups.items()):
        kinds: list[Source] = []
        if any(image.is_local_field for image in members):
            kinds.append("localfield")
        if any(image.part in COMPLEX for image in members):
            kinds.append("megre")
        chosen = source if source in kinds else (kinds[0] if kinds and source is None else None)
        if chosen is not None:
            fitting = [i for i in shared if dict(i.recording).items() <= dict(entities).items()]
            others = [image for image in members if image.suffix not in SHARED]
            yield Recording(entities, chosen, (*others, *fitting))
        elif not kinds:
            lonely = [
                i.path.name for i in members if i.suffix in GRADIENT_ECHOES and i.part == "mag"
            ]
            found.unused.setdefault(NO_PHASE, []).extend(lonely)


def _images(root: Path, subject: str, found: Found) -> Iterator[BidsImage]:
    """Yield the images of a subject, and note what sounds like one and cannot be taken.

    Raises
    ------
    DataError
        If a folder cannot be read, or an image has the name of another subject or session.
    """
    searched, elsewhere = _data_folders(root / subject, found)
    for folder, session in searched:
        entries = _entries(folder, found)
        elsewhere += [p for p in entries if p.suffix not in OF_FILES and os.path.isdir(p)]
        for path in entries:
            image = _image(path, root)
            if image is None:
                _note(path.name, NO_NAME, found)
                continue
            named = [f"{k}-{v}" for k, v in image.entities.items() if k in ("sub", "ses")]
            if named != [subject, *session]:
                raise DataError(
                    f"{path} is named {'_'.join(named)} and lies in the folder of "
                    f"{'_'.join([subject, *session])}; rename or move it"
                )
            if not (image.is_local_field or image.suffix == "mask" or image.part in KNOWN_PARTS):
                other = NO_MASK if "mask" in image.suffix.lower() else NO_SEQUENCE
                need = OF_A_FIELD_MAP if image.suffix in FIELD_MAPS else other
                _note(path.name, need, found)
            yield image
    elsewhere = [path for path in elsewhere if not path.is_symlink()]
    for path in (path for other in elsewhere for path in (other, *other.rglob("*.nii*"))):
        image = _image(path, root)
        if image is not None and (image.part in COMPLEX or image.is_local_field):
            found.unused.setdefault(NOT_SEARCHED, []).append(path.name)


def _image(path: Path, root: Path) -> BidsImage | None:
    match = IMAGE.fullmatch(path.name)
    pairs = match["entities"].rstrip("_").split("_") if match else []
    entities = dict(pair.split("-", 1) for pair in pairs)
    if match is None or len(entities) < len(pairs):
        return None
    return BidsImage(path, root, entities, match["suffix"])


def _note(name: str, need: str, found: Found) -> None:
    if SOUNDS.search(name) and ".nii" in name.lower():
        found.unused.setdefault(need, []).append(name)


def _data_folders(subject: Path, found: Found) -> tuple[list[tuple[Path, list[str]]], list[Path]]:
    """Return the folders of a subject that are searched, with their sessions, and what else is."""
    inside = [(path, list[str]()) for path in _entries(subject, found)]
    for session in [path for path, _ in inside if path.name.startswith("ses-")]:
        if not os.path.isfile(session):
            inside.remove((session, []))
            inside += [(path, [session.name]) for path in _entries(session, found)]
    searched = [
        (path, session)
        for path, session in inside
        if path.name in FOLDERS and not os.path.isfile(path)
    ]
    others = [path for path, _ in inside if path.name not in (*FOLDERS, *OTHER_FOLDERS)]
    return searched, others


def _derivatives(dataset: Path, ours: Path, found: Found) -> list[Path]:
    own = os.path.realpath(ours)  # unlike Path.resolve it takes links that go in a circle
    return [d for d in _folders(dataset / "derivatives", found) if os.path.realpath(d) != own]


def _folders(folder: Path, found: Found) -> list[Path]:
    """Return the folders in a folder, and what may be one: links to nothing too."""
    return [path for path in _entries(folder, found) if not os.path.isfile(path)]


def _entries(folder: Path, found: Found) -> list[Path]:
    """Return what is in a folder, by name; nothing where there is none.

    Raises
    ------
    DataError
        If it cannot be read, or is no folder.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        require_files([folder] if not os.path.exists(folder) else [])
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); correct its rights, or remove it"
        ) from error
    if not paths:
        above = 3 if folder.parent.name.startswith("ses-") else 2
        found.unused.setdefault(EMPTY, []).append("/".join(folder.parts[-above:]))
    return paths


def _require_dataset(dataset: Path) -> None:
    if not dataset.is_dir():
        raise DataError(f"{dataset}: no such folder; pass the root of a BIDS dataset")
    if not os.path.lexists(dataset / DESCRIPTION):
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


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "no subject"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
