"""Which recordings a BIDS dataset holds: local field maps and multi-echo GRE, by their names.

Only names are read here; what is in the files is judged when a recording is run, so that one bad
recording does not stop the others.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.bids.layout import BidsImage, Recording, Source
from qsm_deploy.runtime.scan.params import load_json_object

DESCRIPTION = "dataset_description.json"
IMAGE = re.compile(
    r"(?P<entities>(?:[a-z0-9]+-[A-Za-z0-9+]+_)+)(?P<suffix>[A-Za-z0-9-]+)\.nii(?:\.gz)?"
)


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
        roots += [
            d for d in sorted(derivatives.iterdir()) if d.is_dir() and d.resolve() != ours.resolve()
        ]
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


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "no subject"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
