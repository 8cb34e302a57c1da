"""What an engine may differ by, for each precision, and what exceeds it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import UNROLLED, ModelCard

# what may be budgeted, larger is worse, and what it needs besides the two maps
METRICS = {
    "mean_ppb": "mean |engine - reference| in the mask",
    "median_ppb": "median of |engine - reference|",
    "p999_ppb": "99.9th percentile of |engine - reference|",
    "max_ppb": "largest |engine - reference|",
    "bias_ppb": "|mean of engine - reference|",
    "nrmse_percent": "norm of the difference by that of the reference, both demeaned",
    "xsim_loss": "1 - XSIM of engine and reference",
    "hfen_percent": "the NRMSE of edges",
    "field_residual_rise": "field residual of the engine less that of the reference",
    "field_bias_ppb": "largest |mean difference| in a bin of local field strength",
    "region_bias_ppb": "largest |mean difference| of a region; needs labels",
    "dgm_slope_error": "|1 - slope| of the deep grey nuclei, engine on reference; needs labels, "
    "five voxels of each",
    "xsim_drop": "XSIM of the reference less that of the engine, both against a truth",
    "nrmse_rise_percent": "NRMSE of the engine less that of the reference, both against a truth",
}
NONFINITE = "nonfinite_voxels"  # never tolerated
UNITS = {"ppb": "ppb", "percent": "%", "voxels": "voxels"}


def rounding_budget(max_ppb: float) -> dict[str, float]:
    """Return what rounding may cost: at most this, and a tenth of it at 99.9 % of the voxels."""
    return {"p999_ppb": max_ppb / 10, "max_ppb": max_ppb}


# Argued from measurements in docs/qsm-check.md. "split" is an fp32 network in whose loop rounding
# adds up. INT8 may be noisy, so besides its noise the slope and the structure of a map are held.
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"max_ppb": 0.01},
    "split": {"max_ppb": 0.1},
    "fp16": rounding_budget(3.0),
    "bf16": rounding_budget(30.0),  # three bits less, and still below what a map is read to
    "int8": {
        "median_ppb": 2.0,
        "max_ppb": 200.0,
        "nrmse_percent": 10.0,
        "xsim_drop": 0.005,
        "dgm_slope_error": 0.03,
    },
}


@dataclass(frozen=True)
class Failure:
    """A metric of one comparison that exceeds its budget."""

    metric: str
    value: float
    budget: float
    where: str

    def __str__(self) -> str:
        """Return metric, value and budget in words."""
        return (
            f"{self.metric} is {quantity(self.metric, self.value)}, the budget is "
            f"{quantity(self.metric, self.budget)} ({self.where})"
        )


def budgets_for(card: ModelCard, given: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the budgets of an engine: the defaults of its precision, and what was given.

    Raises
    ------
    UsageError
        If there are no defaults for its precision and none was given.
    """
    precision: str = card.precision
    if precision == "fp32" and card.pipeline in UNROLLED:
        precision = "split"
    found = dict(DEFAULTS.get(precision, {})) | dict(given)
    if not found:
        raise UsageError(f"no default budgets for {precision}; pass --budget METRIC=VALUE")
    return found


def parse_budget(text: str) -> tuple[str, float]:
    """Return the metric and the number of ``METRIC=VALUE``.

    Raises
    ------
    ValueError
        If there is no such metric, or the value is no finite number that is not negative.
    """
    name, _, number = text.partition("=")
    if name not in METRICS:
        raise ValueError(f"{text!r}: the metrics are {', '.join(METRICS)}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{text!r}: write METRIC=VALUE with a number of 0 or more, as max_ppb=0.5")
    return name, value


def failures(rows: Sequence[Mapping[str, Any]], budgets: Mapping[str, float]) -> list[Failure]:
    """Return what exceeds its budget, by metric the worst comparison first.

    Parameters
    ----------
    rows
        Comparisons as of :func:`qsm_deploy.export.measure.comparison.compare`, with ``where``.
    budgets
        By metric. One that no comparison has is not judged.
    """
    found = []
    for metric, budget in {NONFINITE: 0.0, **budgets}.items():
        over = [
            Failure(metric, judged(metric, row), budget, str(row["where"]))
            for row in rows
            if metric in row
        ]
        found += sorted((f for f in over if not f.value <= budget), key=lambda f: -f.value)
    return found


def judged(metric: str, row: Mapping[str, Any]) -> float:
    """Return the value of a comparison that counts against a budget: of a bias its size."""
    value = float(row[metric])
    return abs(value) if metric == "bias_ppb" else value


def unmeasured(rows: Sequence[Mapping[str, Any]], budgets: Mapping[str, float]) -> list[str]:
    """Return the budgeted metrics that no comparison has, for lack of labels or a truth."""
    return [metric for metric in budgets if not any(metric in row for row in rows)]


def quantity(metric: str, value: float) -> str:
    """Return a value with the unit that its metric's name ends in."""
    unit = UNITS.get(metric.rsplit("_", 1)[-1], "")
    return f"{value:.3g} {unit}".strip()
