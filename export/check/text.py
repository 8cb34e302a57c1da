"""What ``qsm-check`` prints for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from qsm_deploy.calibration.budgets import NONFINITE, Failure

COLUMNS = {
    "mean_ppb": "mean",
    "median_ppb": "median",
    "p999_ppb": "p99.9",
    "max_ppb": "max",
    "nrmse_percent": "NRMSE %",
    "xsim_loss": "1-XSIM",
    "hfen_percent": "HFEN %",
}
WHOLE_FROM, TINY = 1000, 1e-3


def result_text(document: Mapping[str, Any]) -> str:
    """Return the comparisons as a table, the ways, and the verdict last."""
    engine = document["engine"]
    rows = document["comparisons"]
    head = ("ppb", *COLUMNS.values())
    body = [(row["where"], *(number(row.get(name)) for name in COLUMNS)) for row in rows]
    lines = table([head, *body])
    lines += [f"{way['by']}: {way['how']}" for way in document["evaluations"]]
    lines.append(f"reference: {document['reference']['how']}")
    budgets = ", ".join(
        f"{name} {budget['budget']:g}" + ("" if budget["measured"] else " (not measured)")
        for name, budget in document["budgets"].items()
    )
    verdict = f"{engine['file']}: {engine['network']} in {engine['precision']}"
    within = "is within" if document["verdict"] == "pass" else "exceeds"
    lines.append(f"{document['verdict'].upper()}: {verdict} {within} its budgets: {budgets}")
    return "\n".join(lines)


def error_text(failed: Sequence[Failure]) -> str:
    """Return the worst of what failed in one line."""
    worst = failed[0]
    others = len(failed) - 1
    more = f"; {others} more over budget" if others else ""
    if worst.metric == NONFINITE:
        return f"the engine's map is NaN or Inf at {worst.value:g} voxels ({worst.where}){more}"
    return f"{worst}{more}"


def number(value: float | None) -> str:
    """Return a number with three digits, two where it is tiny; a dash for none."""
    if value is None:
        return "-"
    if abs(value) >= WHOLE_FROM:
        return f"{value:.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= TINY else f"{value:.1e}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{w}}" if n == 0 else f"{cell:>{w}}"
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
