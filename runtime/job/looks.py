"""What a run is looked at by: its picture, and its page."""

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.job.outputs import Outputs
from qsm_deploy.runtime.job.report import numbers, page_rows, way_text
from qsm_deploy.runtime.page.figure import png_of, scan_figure
from qsm_deploy.runtime.page.parts import json_script, note, page, section, table
from qsm_deploy.runtime.page.planes import voxel_at
from qsm_deploy.runtime.page.rows import scan_rows
from qsm_deploy.runtime.page.thumbnail import thumbnail
from qsm_deploy.runtime.page.viewer import viewer, viewer_head
from qsm_deploy.runtime.scan.scan import Scan, ScanFiles

PURPOSE = "For research, not for diagnosis."
TO_INDEX = '<p><a href="index.html">all recordings</a></p>\n'  # beside the page of each


def drawing(run: dict[str, Any], scan: Scan, maps: Mapping[str, Volume], outputs: Outputs) -> bytes:
    """Return the picture of a run, PNG."""
    rows = scan_rows(scan, maps, unit=outputs.units, window=outputs.window)
    about = way_text(run)
    return png_of(scan_figure(scan, rows, run["title"], about=about, slices=outputs.slices))


def run_page(
    run: dict[str, Any],
    scan: Scan,
    maps: Mapping[str, Volume],
    outputs: Outputs,
    files: ScanFiles,
) -> bytes:
    """Return the page of a run, which says nothing of its files unless it is to name them.

    Parameters
    ----------
    run
        What it says about itself, with its times.
    scan, maps
        What it was made of, and what was made, by the names in cards.
    outputs
        How it is shown.
    files
        What was read.
    """
    name = outputs.name
    title = f"{name}: {run['title']}" if name else f"Susceptibility map: {run['title']}"
    notes = [without_names(said, files) for said in run["input"]["notes"]]
    shown = run["input"]["notes"] if outputs.html_names else notes
    looked = viewer(
        scan_rows(scan, maps, unit=outputs.units, window=outputs.window),
        scan.mask,
        scan.geometry,
        scan.affine,
        title=title,
        about=way_text(run),
        at=None if outputs.slices is None else voxel_at(outputs.slices, scan),
        axes=scan.axes,
    )
    rows = [((what, ""), (said, "")) for what, said in page_rows(run, outputs.html_names).items()]
    summary = _summary(run, scan, maps) | {"name": name, "notes": notes}
    return page(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            note(PURPOSE) + TO_INDEX * bool(name),
            "".join(f'<p class="warning">{escape(line)}</p>\n' for line in shown),
            looked,
            section("How it was made", table(("", ""), rows, text_columns=(1,))),
        ],
        head=json_script(summary, "summary") + viewer_head(),
    ).encode()


def _summary(run: dict[str, Any], scan: Scan, maps: Mapping[str, Volume]) -> dict[str, Any]:
    """Return what an index tells of a run."""
    name, first = next(iter(maps.items()))
    return {
        "made_by": run["made_by"],
        "title": run["title"],
        **numbers(run, scan),
        "seconds": run["total_seconds"],
        "thumbnail": thumbnail(first, scan, name),
    }


def without_names(text: str, files: ScanFiles) -> str:
    """Return a note without the names of files and their sidecars, which may tell a patient's."""
    for role, given in files._asdict().items():
        what = "the field" if role == "fields" else f"the {role.replace('_', ' ')}"
        for path in filter(None, given if isinstance(given, tuple) else (given,)):
            text = text.replace(f"{path.parent}/", "")
            stem = re.escape(path.name.partition(".")[0])
            text = re.sub(rf"(?<![\w.-]){stem}(\.[A-Za-z0-9]+)+", what, text)
    return text
