"""Numbers of one map, for the table of a cohort."""

import csv
import re
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.bids.layout import BidsImage, Recording
from qsm_deploy.runtime.bids.metadata import applying_files
from qsm_deploy.runtime.console.inputs import require_files
from qsm_deploy.runtime.job.one_scan import Finished
from qsm_deploy.runtime.job.report import numbers
from qsm_deploy.runtime.reconstruction.inversion import CHI
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volumes, on_grid
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

# the nuclei whose iron QSM is read for, as atlases and FreeSurfer call them
DEEP_GREY = re.compile(
    r"caudate|putamen|pallid|thalam|accumbens|nigra|red[^a-z]*nucleus|dentate|\b(gpe|gpi|stn)\b",
    re.I,
)
REGIONS = "chi_ppb"  # means, by the names of regions


def findings_of(finished: Finished, recording: Recording) -> tuple[dict[str, Any], list[str]]:
    """Return the numbers of a map that was made, and what is wrong with segmentations.

    They are its field residual, the field's noise, the mask's volume, and the means of the deep
    grey nuclei, where there is a segmentation.
    """
    scan = finished.scan
    assert scan is not None  # something was made of it
    found = numbers(finished.report, scan)
    wrong: list[str] = []
    for image in (image for image in recording.images if image.suffix == "dseg"):
        if CHI in finished.maps:
            chi_ppm, mask = map(scan.axes.turn_back, (finished.maps[CHI], scan.mask))
            try:
                means = _deep_grey_ppb(chi_ppm, mask, recording, image)
                known = found.get(REGIONS, {})
                if twice := sorted(known.keys() & means):
                    wrong.append(f"{image.path.name} has {', '.join(twice)}, too, and is not used")
                found[REGIONS] = means | known
            except (DataError, MemoryError) as error:
                wrong.append(f"no means of its nuclei: {error or 'out of memory'}")
    return found, wrong


def _deep_grey_ppb(
    chi_ppm: Any, mask: Any, recording: Recording, image: BidsImage
) -> dict[str, float]:
    """Return the mean of every deep grey nucleus in the mask [ppb], by its name.

    A segmentation counts if it lies on the measurement's grid and has a table of names.

    Raises
    ------
    DataError
        If it, or its table, cannot be read.
    """
    names = _names(image)
    if not names:
        return {}
    if recording.source == "localfield":
        measured = recording.local_field().path
    else:
        measured = recording.echoes()[0][0].path
    require_files([image.path])
    if not on_grid(image.path, measured):
        return {}
    stored = load_on_grid(image.path, load_volumes(measured)[0]).data
    labels = np.where(mask, np.rint(stored), 0).astype(np.int64)
    nuclei = {name for _, name in names if DEEP_GREY.search(name)}
    inside = {one: np.isin(labels, [n for n, name in names if name == one]) for one in nuclei}
    return {
        name: round(PPB_PER_PPM * float(chi_ppm[region].mean(dtype=np.float64)), 3)
        for name, region in sorted(inside.items())
        if region.any()
    }


def _names(image: BidsImage) -> list[tuple[int, str]]:
    """Return what a segmentation calls its labels, several of which may be called alike.

    Nothing where no table says it.

    References
    ----------
    BIDS specification 1.10, "Discrete segmentations": columns ``index`` and ``name``.
    """
    tables = applying_files(image, ".tsv")
    if not tables:
        return []
    require_files(tables)
    try:
        with tables[-1].open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t")
            lacking = {"index", "name"} - set(table.fieldnames or ())
            names = [(int(row["index"]), row["name"].strip()) for row in table if not lacking]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{tables[-1]}: cannot be read as a table ({error})") from error
    if lacking:
        raise DataError(f"{tables[-1]}: no column {min(lacking)}, separated by tabs")
    return names
