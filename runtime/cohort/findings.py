"""Numbers of one map, for the table of a cohort."""

import csv
import re
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.bids.layout import BidsImage, Recording
from qsm_deploy.runtime.bids.metadata import applying_files
from qsm_deploy.runtime.job.one_scan import Finished
from qsm_deploy.runtime.job.report import numbers
from qsm_deploy.runtime.reconstruction.inversion import CHI
from qsm_deploy.runtime.scan.nifti import load_volume, on_grid
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

# the nuclei whose iron QSM is read for, as atlases and FreeSurfer call them
DEEP_GREY = re.compile(
    r"caudate|putamen|pallid|thalam|accumbens|nigra|red[^a-z]*nucleus|dentate|\b(gpe|gpi|stn)\b",
    re.I,
)
REGIONS = "chi_ppb"  # means, by the names of regions


def findings_of(finished: Finished, recording: Recording) -> dict[str, Any]:
    """Return the numbers of a map that was made: residual, noise, mask, deep grey nuclei.

    Raises
    ------
    DataError
        If a segmentation that lies on the measurement's grid, or its table, cannot be read.
    """
    scan = finished.scan
    assert scan is not None  # something was made of it
    found = numbers(finished.report, scan)
    if CHI in finished.maps:
        chi_ppm = scan.axes.turn_back(finished.maps[CHI])
        if means := _deep_grey_ppb(chi_ppm, scan.axes.turn_back(scan.mask), recording):
            found[REGIONS] = means
    return found


def _deep_grey_ppb(chi_ppm: Any, mask: Any, recording: Recording) -> dict[str, float]:
    """Return the mean of every deep grey nucleus in the mask [ppb], by its name.

    Nuclei come from every ``_dseg`` of the recording, its session or its subject that lies on the
    measurement's grid and has a table of names.
    """
    if recording.source == "localfield":
        measured = recording.local_field().path
    else:
        measured = recording.echoes()[0][0].path
    means: dict[str, float] = {}
    for image in recording.images:
        if image.suffix != "dseg" or not (names := _names(image)):
            continue
        if not on_grid(image.path, measured):
            continue
        labels = np.where(mask, np.rint(load_volume(image.path).data), 0).astype(np.int64)
        for index, name in names.items():
            if DEEP_GREY.search(name) and (inside := labels == index).any():
                means[name] = round(PPB_PER_PPM * float(chi_ppm[inside].mean(dtype=np.float64)), 3)
    return means


def _names(image: BidsImage) -> dict[int, str]:
    """Return what a segmentation calls its labels; nothing where no table says it.

    References
    ----------
    BIDS specification 1.10, "Discrete segmentations": columns ``index`` and ``name``.
    """
    tables = applying_files(image, ".tsv")
    if not tables:
        return {}
    try:
        with tables[-1].open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return {int(row["index"]): row["name"].strip() for row in rows}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{tables[-1]}: no table of the columns index and name ({error})"
        ) from error
