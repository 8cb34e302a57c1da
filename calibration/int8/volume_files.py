"""Which files of a calibration folder or list are field maps, and which masks belong to them."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsm_deploy.kernels.errors import DataError

SUFFIXES = (".nii.gz", ".nii")
LIST_SUFFIX = ".txt"
MASK, FIELD, PARAMS = "mask", "field", "params.json"
# what stands beside a field without being one
NO_FIELDS = ("chi", "label", "truth", "seg", "magnitude", "mag")
EXPECTED = (
    f"expected NAME.nii.gz with NAME_{MASK}.nii.gz, folders with {FIELD}.nii.gz and "
    f"{MASK}.nii.gz (as qsm-phantom writes), or a list {LIST_SUFFIX} of lines FIELD MASK"
)


@dataclass(frozen=True)
class VolumeFiles:
    """The files of one acquisition: fields of one or several orientations, mask, parameters."""

    fields: tuple[Path, ...]
    mask: Path
    params: Path | None = None


def find_volumes(source: Path) -> list[VolumeFiles]:
    """Return the acquisitions in a folder or a list, sorted by name.

    Parameters
    ----------
    source
        A folder with maps and ``NAME_mask`` beside them, or with folders that hold a map and
        ``mask`` each, or a text file with a line ``FIELD [FIELD ...] MASK`` for each acquisition,
        paths relative to it.

    Raises
    ------
    DataError
        If there is nothing, a mask is missing, or a folder does not tell which file is the map.
    """
    if source.is_dir():
        found = _in_folder(source)
        for folder in sorted(path for path in source.iterdir() if path.is_dir()):
            found += _in_folder(folder)
        if not found:
            raise DataError(f"{source}: no field maps for the calibration; {EXPECTED}")
        return found
    if not source.is_file() or source.suffix != LIST_SUFFIX:
        seen = "no such file or folder" if not source.exists() else "neither a folder nor a list"
        raise DataError(f"{source}: {seen}; {EXPECTED}")
    return _in_list(source)


def _in_list(source: Path) -> list[VolumeFiles]:
    found = []
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: not a readable text file ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            names = shlex.split(line, comments=True)
        except ValueError as error:
            raise DataError(f"{source}, line {number}: {error}") from None
        if not names:
            continue
        if len(names) < 2:
            raise DataError(f"{source}, line {number}: no mask for {names[0]}; write FIELD MASK")
        *fields, mask = (source.parent / name for name in names)
        found.append(VolumeFiles(tuple(fields), mask, _params(fields[0].parent)))
    if not found:
        raise DataError(f"{source}: lists no field maps; {EXPECTED}")
    return found


def _in_folder(folder: Path) -> list[VolumeFiles]:
    volumes = {_stem(path): path for path in sorted(folder.iterdir()) if _stem(path)}
    params = _params(folder)
    if MASK in volumes:
        field = _only_field(folder, volumes)
        return [VolumeFiles((volumes[field],), volumes[MASK], params)] if field else []
    found = []
    for stem in volumes:
        if stem.endswith(f"_{MASK}") or _is_no_field(stem):
            continue
        if (mask := volumes.get(f"{stem}_{MASK}")) is None:
            raise DataError(
                f"{volumes[stem]}: its mask {stem}_{MASK}.nii.gz is missing; air must not count, "
                f"so every map needs one: {EXPECTED}"
            )
        found.append(VolumeFiles((volumes[stem],), mask, params))
    return found


def _only_field(folder: Path, stems: Sequence[str] | dict[str, Path]) -> str | None:
    if FIELD in stems:
        return FIELD
    likely = [stem for stem in stems if stem != MASK and not _is_no_field(stem)]
    if len(likely) > 1:
        raise DataError(
            f"{folder}: {' or '.join(likely)}, which one is the field map? Name it {FIELD}.nii.gz, "
            f"or pass a list {LIST_SUFFIX} of lines FIELD MASK"
        )
    return likely[0] if likely else None


def _is_no_field(stem: str) -> bool:
    return stem.lower().startswith(NO_FIELDS)


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s)), "")


def _params(folder: Path) -> Path | None:
    path = folder / PARAMS
    return path if path.is_file() else None
