"""The table of a cohort: a row for every recording, tab separated, as BIDS has its tables."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.cohort.findings import REGIONS
from qsm_deploy.runtime.cohort.outcomes import Outcome
from qsm_deploy.runtime.console.atomic import check_writable, write_atomically
from qsm_deploy.runtime.job.report import COMPARED

NOTHING = "n/a"
FIRST = ("participant_id", "recording", "state")  # columns


def require_table(path: Path) -> None:
    """Refuse to put a table where it cannot be, or where there is a file that is none of these.

    Raises
    ------
    UsageError
        If there is such a file.
    DataError
        If it cannot be written.
    """
    if path.suffix != ".tsv":
        raise UsageError(f"--table {path} must end in .tsv")
    check_writable(path, force=True)
    if path.exists() and not path.read_bytes().startswith("\t".join(FIRST).encode()):
        raise UsageError(f"{path} is no table of qsm-run; choose another --table")


def write_table(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write a table, unless it stands there already or would be empty.

    Raises
    ------
    DataError
        If it cannot be written.
    """
    rows = [*outcomes]
    content = group_table(rows)
    if rows and not (path.is_file() and path.read_bytes() == content):
        write_atomically(path, content, force=True)


def names_in(path: Path) -> set[str]:
    """Return the recordings of a table that was written, if there is one.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    if not path.is_file():
        return set()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            return {row[FIRST[1]] for row in rows if row.get(FIRST[1])}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it, to have it anew") from error


def group_table(outcomes: Iterable[Outcome]) -> bytes:
    """Return a table of recordings: what was found of each, then the deep grey nuclei [ppb].

    The nuclei have a column each, ``chi_ppb_NAME``, by their names in the datasets' own tables.
    """
    rows = sorted(outcomes, key=lambda outcome: outcome.recording)
    names = sorted({name for one in rows for name in one.findings.get(REGIONS, {})})
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(
        [*FIRST, *COMPARED, "voxel_size_mm"]
        + [f"{REGIONS}_{name}" for name in names]
        + ["seconds", "reason"]
    )
    for one in rows:
        found = one.findings
        means = found.get(REGIONS, {})
        sizes = " x ".join(f"{size:.4g}" for size in found.get("voxel_size_mm", ()))
        cells = [_number(found.get(key)) for key in COMPARED]
        cells += [sizes or NOTHING, *(_number(means.get(name)) for name in names)]
        reason = " ".join(one.reason.split()) or NOTHING
        subject = one.recording.partition("_")[0]
        row = [subject, one.recording, one.state, *cells, _number(one.seconds or None), reason]
        table.writerow([value.encode(errors="replace").decode() for value in row])
    return text.getvalue().encode()


def _number(value: Any) -> str:
    return NOTHING if value is None else f"{value:.6g}"
