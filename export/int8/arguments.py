"""The flags of ``qsm-export`` about INT8, and what it tells of it."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from qsm_deploy.calibration.budgets import DEFAULTS
from qsm_deploy.runtime.job.arguments import field_unit
from qsm_deploy.runtime.scan.unit_names import UNITS

if TYPE_CHECKING:
    from qsm_deploy.calibration.int8.choice import Int8Result

BUDGET = DEFAULTS["int8"]
COLLECTORS = ("max", "percentile-99.9", "percentile-99.99", "entropy", "mse")


def add_int8(group: "argparse._ArgumentGroup") -> None:
    """Add what is about INT8."""
    group.add_argument(
        "--calibration",
        metavar="DIR|LIST.txt|phantoms",
        help="field maps that ranges are measured on: NAME.nii.gz with NAME_mask.nii.gz, or "
        "folders with field.nii.gz and mask.nii.gz; a list of lines FIELD MASK; or, for want of "
        "any, three phantoms",
    )
    group.add_argument(
        "--calibration-units",
        type=field_unit,
        metavar="|".join(UNITS),
        help="of the maps, default ppm; echo_time_s and field_strength_t are in params.json "
        "beside them",
    )
    group.add_argument(
        "--collector",
        choices=COLLECTORS,
        help="how a range follows from what was measured (default mse)",
    )
    group.add_argument(
        "--patches", type=_count, metavar="N", help="patches measured in (default 16)"
    )
    group.add_argument(
        "--seed", type=_count, metavar="N", help="decides where the patches are (default 0)"
    )
    group.add_argument(
        "--budget-ppb",
        type=positive,
        metavar="PPB",
        help=f"median in-mask error that INT8 may cost (default {BUDGET['median_ppb']:g}); the "
        "most harmful layers fall back to FP16 until it holds",
    )
    group.add_argument(
        "--budget-xsim",
        type=positive,
        metavar="X",
        help=f"change of XSIM that it may cost (default {BUDGET['xsim_drop']:g})",
    )
    group.add_argument(
        "--budget-max-ppb",
        type=positive,
        metavar="PPB",
        help="largest in-mask error that it may cost, which is where it clips a lesion (default "
        f"{BUDGET['max_ppb']:g})",
    )


def positive(text: str) -> float:
    """Return a positive number, as argparse wants it."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def int8_result(found: "Int8Result") -> dict[str, object]:
    """Return what was found, for JSON."""
    from qsm_deploy.calibration.int8.table import row_dicts

    errors = {"error": found.error, "all_int8": found.all_int8, "fp16": found.fp16}
    return {
        "share": found.share,
        "kept_fp16": found.why_not,
        "calibration_sha256": found.calibration_sha256,
        **{name: dataclasses.asdict(error) for name, error in errors.items()},
        "layers": row_dicts(found.rows),
    }


def int8_text(found: "Int8Result") -> str:
    """Return what was found as people read it: the table of layers, then the errors."""
    from qsm_deploy.calibration.int8.table import table_lines

    lines = [
        *table_lines(found.rows),
        f"all that may be in INT8: {found.all_int8}",
        f"none in INT8: {found.fp16}",
        found.why_not
        or f"{100 * found.share:.0f} % of the multiply-accumulates in INT8: {found.error}",
    ]
    return "\n".join(lines) + "\n"
