"""How far one map is from another of the same scan: everything that a gate may ask for."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.metrics.difference import difference_ppb, distribution_ppb
from qsm_deploy.runtime.metrics.metrics import all_metrics, field_residual, hfen, nrmse, xsim
from qsm_deploy.runtime.metrics.regional_metrics import DEEP_GREY, dgm_slope
from qsm_deploy.runtime.scan.agreement import varies
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

Row = dict[str, Any]

FIELD_BINS, FEWEST_IN_BIN = 24, 20
FEWEST_IN_NUCLEUS = 5  # voxels; the mean of fewer is noise, and no slope goes through noise
FIELD_RANGE_PERCENT = (0.1, 99.9)  # of the voxels; beyond them bins would be nearly empty
DIGITS = 6


@dataclass(frozen=True)
class Reference:
    """A map to compare with, and what does not depend on the engine.

    Attributes
    ----------
    chi_ppm
        (x, y, z) reference map, finite in the scan's mask.
    scan
        What it was made of, with a truth and labels if there are.
    field_ppm
        (x, y, z) local field, ``None`` where the network takes something else.
    residual
        The field residual of the map, if there is a field.
    against_truth
        The map's metrics against the truth; empty without one.
    """

    chi_ppm: Volume
    scan: Scan
    field_ppm: Volume | None
    residual: float | None
    against_truth: dict[str, float]


def reference_from(chi_ppm: Volume, scan: Scan, field_ppm: Volume | None) -> Reference:
    """Return the reference that a map is.

    Raises
    ------
    EngineError
        If it is not finite, or constant, so that no error is relative to it.
    """
    inside = chi_ppm[scan.mask]
    if bad := int(np.count_nonzero(~np.isfinite(inside))):
        raise EngineError(
            f"the reference itself is NaN or Inf at {bad} voxels of the mask; check the field and "
            "the weights"
        )
    if not varies(inside.astype(np.float64)):
        raise EngineError(
            f"the reference is constant in the mask ({inside[0]:.4g} ppm), so there is nothing to "
            "compare; check the field and the weights"
        )
    residual, against_truth = None, {}
    if field_ppm is not None:
        residual = field_residual(chi_ppm, field_ppm, scan.mask, scan.geometry)
    if scan.truth_ppm is not None:
        against_truth = all_metrics(chi_ppm, scan.truth_ppm, scan.mask, scan.labels)
    return Reference(chi_ppm, scan, field_ppm, residual, against_truth)


def compare(chi_ppm: Volume, reference: Reference) -> Row:
    """Return how an engine's map differs from the reference, by names that tell the unit.

    Parameters
    ----------
    chi_ppm
        (x, y, z) the engine's map.
    reference
        The other map of the same scan.

    Returns
    -------
    dict
        Plain values for JSON, rounded to six digits. A map that is not finite in the mask has
        ``nonfinite_voxels`` and nothing else. What needs labels, a truth or a local field is left
        out without.
    """
    scan, mask = reference.scan, reference.scan.mask
    bad = int(np.count_nonzero(~np.isfinite(chi_ppm[mask])))
    row: Row = {"nonfinite_voxels": bad}
    if bad:
        return row
    difference = difference_ppb(chi_ppm, reference.chi_ppm, mask)
    row |= distribution_ppb(difference)
    worst = int(np.abs(difference).argmax())
    row["worst_voxel"] = [int(n[worst]) for n in np.nonzero(mask)]
    row["nrmse_percent"] = nrmse(chi_ppm, reference.chi_ppm, mask)
    row["xsim_loss"] = 1 - xsim(chi_ppm, reference.chi_ppm, mask)
    row["hfen_percent"] = hfen(chi_ppm, reference.chi_ppm, mask)
    if reference.field_ppm is not None and reference.residual is not None:
        residual = field_residual(chi_ppm, reference.field_ppm, mask, scan.geometry)
        row["field_residual"] = {"engine": residual, "reference": reference.residual}
        row["field_residual_rise"] = residual - reference.residual
        row["bias_by_field"] = _bias_by_field(difference, reference.field_ppm[mask])
        row["field_bias_ppb"] = max(
            (abs(b["mean_ppb"]) for b in row["bias_by_field"]), default=abs(row["bias_ppb"])
        )
    if scan.labels is not None:
        row |= _by_region(chi_ppm, reference, difference)
    if scan.truth_ppm is not None:
        known = reference.against_truth
        found = all_metrics(chi_ppm, scan.truth_ppm, mask, scan.labels)
        row["against_truth"] = {"engine": found, "reference": known}
        row["xsim_drop"] = known["xsim_uniform5"] - found["xsim_uniform5"]
        row["nrmse_rise_percent"] = found["nrmse_percent"] - known["nrmse_percent"]
    plain: Row = rounded(row)
    return plain


def rounded(value: Any) -> Any:
    """Return a value of JSON with every number at six digits, as much as anyone reads."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float) and value and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value


def _bias_by_field(difference: NDArray[np.float64], field: NDArray[np.float32]) -> list[Row]:
    """Return the difference in bins of the local field, fields of few voxels left out."""
    low, high = np.percentile(field, FIELD_RANGE_PERCENT)
    edges = np.linspace(low, high, FIELD_BINS + 1)
    bins = np.digitize(field, edges) - 1
    found = []
    for n in range(FIELD_BINS):
        inside = difference[bins == n]
        if inside.size >= FEWEST_IN_BIN:
            p5, p95 = np.percentile(inside, (5, 95))
            found.append(
                {
                    "field_ppm": float(edges[n : n + 2].mean()),
                    "voxels": int(inside.size),
                    "mean_ppb": float(inside.mean()),
                    "p5_ppb": float(p5),
                    "p95_ppb": float(p95),
                }
            )
    return found


def _by_region(chi_ppm: Volume, reference: Reference, difference: NDArray[np.float64]) -> Row:
    scan = reference.scan
    assert scan.labels is not None
    inside = scan.labels[scan.mask]
    names = {int(label): label.name.lower().replace("_", " ") for label in Label}
    regions: list[Row] = [
        {
            "label": int(label),
            "region": names.get(int(label), f"label {label}"),
            "voxels": int(np.count_nonzero(inside == label)),
            "reference_ppb": PPB_PER_PPM
            * float(reference.chi_ppm[scan.mask][inside == label].mean(dtype=np.float64)),
            "bias_ppb": float(difference[inside == label].mean()),
            "mean_ppb": float(np.abs(difference[inside == label]).mean()),
        }
        for label in np.unique(inside[inside > 0])
    ]
    if not regions:
        return {}
    found: Row = {"regions": regions, "region_bias_ppb": max(abs(r["bias_ppb"]) for r in regions)}
    in_mask = np.where(scan.mask, scan.labels, 0)
    nuclei = [region["voxels"] for region in regions if region["label"] in DEEP_GREY]
    slope = dgm_slope(chi_ppm, reference.chi_ppm, in_mask)
    if slope is not None and min(nuclei) >= FEWEST_IN_NUCLEUS:
        found["dgm_slope"] = slope
        found["dgm_slope_error"] = abs(1 - slope)
    return found
