"""The report of a check: one page that needs nothing but a browser."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qsm_deploy.calibration.budgets import METRICS, NONFINITE, Failure, judged, quantity
from qsm_deploy.export.check.cases import Compared
from qsm_deploy.export.check.figures import charts_png, planes_viewer
from qsm_deploy.export.check.text import number
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.page.parts import Cell, cells, note, page, picture, section, table
from qsm_deploy.runtime.page.viewer import MOST_BYTES, viewer_head

SIDES = ("engine", "reference")
DISTRIBUTION = {
    "mean_ppb": "mean",
    "median_ppb": "median",
    "p999_ppb": "p99.9",
    "max_ppb": "max",
    "bias_ppb": "bias",
}
RELATIVE = {"nrmse_percent": "NRMSE [%]", "xsim_loss": "1 - XSIM", "hfen_percent": "HFEN [%]"}
TRUTH = {
    "nrmse_percent": "NRMSE [%]",
    "xsim_uniform5": "XSIM",
    "hfen_percent": "HFEN [%]",
    "dgm_linearity": "deep grey |1 - slope|",
}
ABOUT_ENGINE = ("network", "precision", "options", "weights_sha256", "licence", "made_by")
AXES = "x to the right, y to the front and z along B0, however the files are stored"
ABOUT_NUMBERS = (
    "Of engine minus reference inside the mask: mean, median, 99.9th percentile and largest "
    "magnitude, and the mean with its sign. XSIM with a uniform window of 5 voxels, HFEN with "
    "sigma 1.5 voxels; the slope is that of the means of the six deep grey nuclei, engine on "
    "reference."
)
SAME_PATH = (
    "Both go through the same reconstruction as qsm-run: the same inputs, the same patches, the "
    "same loop where a network has one."
)
WHICH = ("volume", "shape", "run", "output", "by")  # comparison


def report_html(document: Mapping[str, Any], compared: Sequence[Compared]) -> str:
    """Return the page.

    Parameters
    ----------
    document
        What ``qsm-check --json`` prints.
    compared
        Its comparisons with their maps; the largest volume of each subject is drawn.
    """
    engine = document["engine"]
    title = f"{engine['file']}: {engine['network']} in {engine['precision']}"
    groups = _groups(compared)
    return page(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            note(f"compared with {_reference(document)}"),
            _verdict(document),
            section("Budgets", _budgets(document)),
            section("Engine and reference", _comparisons(document)),
            section("Against the truth", _truth(document)),
            *(
                section(f"Pictures: {_about(group)}", _pictures(group, len(groups)))
                for group in groups
            ),
            section("By region", "".join(map(_regions, groups))),
            section("How it was evaluated", _how(document)),
            section("What was read", _files(document) + _volumes(document) + _versions(document)),
        ],
        head=viewer_head(),
    )


def _reference(document: Mapping[str, Any]) -> str:
    names = ", ".join(file["file"] for file in document["reference"]["files"])
    return f"{names}, run {document['reference']['how']}"


def _verdict(document: Mapping[str, Any]) -> str:
    failed = [str(Failure(**failure)) for failure in document["failures"]]
    lines = failed or [f"{len(document['comparisons'])} comparisons, each within every budget"]
    word = document["verdict"].upper()
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="verdict {word.lower()}"><strong>{word}</strong>{text}</div>'


def _budgets(document: Mapping[str, Any]) -> str:
    rows: list[tuple[Cell, ...]] = []
    over = {failure["metric"] for failure in document["failures"]}
    budgets = {NONFINITE: 0.0} | {n: b["budget"] for n, b in document["budgets"].items()}
    for metric, budget in budgets.items():
        first = cells(metric, METRICS.get(metric, "NaN or Inf in the mask"))
        first += cells(quantity(metric, budget))
        having = [row for row in document["comparisons"] if metric in row]
        if not having:
            rows.append(first + cells("-", "-", "not measured: needs labels or a truth"))
            continue
        value, where = max((judged(metric, row), row["where"]) for row in having)
        verdict = ("exceeded", "over") if metric in over else ("within", "ok")
        rows.append((*first, *cells(quantity(metric, value), where), verdict))
    head = ("metric", "what it is", "budget", "worst", "where", "")
    return table(head, rows, text_columns=(1, 4, 5))


def _comparisons(document: Mapping[str, Any]) -> str:
    over = {failure["where"] for failure in document["failures"]}
    rows = []
    for row in document["comparisons"]:
        numbers = [number(row.get(name)) for name in (*DISTRIBUTION, *RELATIVE)]
        numbers.append(_pair(row.get("field_residual", {})))
        slope = row.get("dgm_slope")
        numbers.append("-" if slope is None else f"{slope:.4f}")
        rows.append(cells(*_which(row), *numbers))
    ppb = [f"{text} [ppb]" for text in DISTRIBUTION.values()]
    head = (*WHICH, *ppb, *RELATIVE.values())
    head += ("field residual, engine / reference", "deep grey slope")
    marked = [row["where"] in over for row in document["comparisons"]]
    return note(ABOUT_NUMBERS) + table(head, rows, text_columns=(1, 2, 3, 4), marked=marked)


def _which(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["subject"], shape_text(row["shape"]), row["run"], row["output"], row["by"]


def _truth(document: Mapping[str, Any]) -> str:
    rows = []
    for row in document["comparisons"]:
        if known := row.get("against_truth"):
            pairs = [_pair({side: known[side].get(name) for side in SIDES}) for name in TRUTH]
            rows.append(cells(*_which(row), *pairs))
    if not rows:
        return ""
    head = (*WHICH, *TRUTH.values())
    return note("Engine / reference.") + table(head, rows, text_columns=(1, 2, 3, 4))


def _regions(group: Sequence[Compared]) -> str:
    listed = [one.row["regions"] for one in group if "regions" in one.row]
    if not listed:
        return ""
    rows = []
    for same in zip(*listed, strict=True):
        numbers = [same[0]["reference_ppb"]]
        numbers += [region[name] for region in same for name in ("bias_ppb", "mean_ppb")]
        rows.append(cells(same[0]["region"], str(same[0]["voxels"]), *map(number, numbers)))
    head = ["region", "voxels", "reference [ppb]"]
    for one in group:
        head += [f"bias, {one.row['by']} [ppb]", f"mean |difference|, {one.row['by']} [ppb]"]
    return note(_about(group)) + table(head, rows)


def _pictures(group: Sequence[Compared], groups: int) -> str:
    worst = max(group, key=lambda one: float(one.row["max_ppb"]))
    planes = note(f"{worst.row['where']}, through its largest difference")
    planes += planes_viewer(worst, MOST_BYTES // groups)
    return planes + picture(charts_png(group), f"charts of {_about(group)}", "charts")


def _how(document: Mapping[str, Any]) -> str:
    ways = {way["by"]: f"the engine is run {way['how']}" for way in document["evaluations"]}
    lines = ways | {"reference": _reference(document)}
    return "".join(
        f"<p><strong>{escape(name)}</strong>: {escape(how)}.</p>\n" for name, how in lines.items()
    ) + note(SAME_PATH)


def _files(document: Mapping[str, Any]) -> str:
    files = [("engine", document["engine"])]
    files += [("reference", file) for file in document["reference"]["files"]]
    for given in document["inputs"]:
        files += [("field", file) for file in given.get("fields", [])]
        files += [(name, given[name]) for name in ("mask", "truth", "labels") if name in given]
    rows = [cells(what, file["file"], file["sha256"]) for what, file in files]
    return table(("what", "file", "sha256"), rows, text_columns=(1, 2))


def _volumes(document: Mapping[str, Any]) -> str:
    rows, notes = [], ""
    for given in document["inputs"]:
        for name, grid in given.get("heads", {given["name"]: given}).items():
            vectors = (_vector(grid["voxel_size_mm"]), _vector(grid["b0_direction"]))
            rows.append(cells(name, shape_text(grid["shape"]), *vectors, str(grid["mask_voxels"])))
        notes += "".join(note(f"{given['name']}: {line}") for line in given.get("notes", []))
    head = ("volume", "shape", "voxel size [mm]", "B0 direction", "voxels in the mask")
    return table(head, rows) + note(AXES) + notes


def _versions(document: Mapping[str, Any]) -> str:
    about = json.dumps({name: document["engine"][name] for name in ABOUT_ENGINE})
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    made = f"{document['made_by']}, {versions}; {document['made_at']}"
    return f"<p>engine: <code>{escape(about)}</code></p>\n" + note(made)


def _groups(compared: Sequence[Compared]) -> list[list[Compared]]:
    """Return the comparisons to draw: of the largest head and of the field, whole if they were.

    Those of one output are one group.

    A comparison that is not finite has nothing to draw, and a box of a field too little.
    """
    found: dict[tuple[bool, str], list[Compared]] = {}
    for one in compared:
        if one.case.box_of or "max_ppb" not in one.row:
            continue
        group = found.setdefault((one.case.is_phantom, one.row["output"]), [])
        if group and _rank(one) > _rank(group[0]):
            group.clear()
        if not group or _rank(one) == _rank(group[0]):
            group.append(one)
    return list(found.values())


def _about(group: Sequence[Compared]) -> str:
    return f"{group[0].case.where}, {group[0].row['output']}"


def _rank(one: Compared) -> tuple[int, bool]:
    return one.case.measured.mask.size, one.case.plan.whole


def _pair(sides: Mapping[str, float | None]) -> str:
    """Return engine / reference, a dash where there is neither."""
    both = [number(sides.get(side)) for side in SIDES]
    return "-" if set(both) == {"-"} else " / ".join(both)


def _vector(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
