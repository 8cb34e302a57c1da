"""Which maps of a derivative dataset are kept by ``--resume``: those that this run would make."""

import os
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.bids.output import Derivative
from qsm_deploy.runtime.console.journal import clear_leftovers
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.scan.params import load_json_object

# what a message calls it, and what a sidecar does
OF_MODEL = {
    "method": "method",
    "said to it": "said",
    "network": "network",
    "weights": "weights_sha256",
    "options": "options",
    "precision": "precision",
}
FIRST = "weights of the part before"
STEPS = "steps to the local field"  # of maps that begin with echoes


def wanted_facts(
    model: dict[str, Any],
    first_weights: str | None,
    units: str,
    dtype: str,
    correction: Correction | None,
    steps: dict[str, Any],
) -> dict[str, Any]:
    """Return what the sidecars of all maps of a run say alike."""
    return {
        **{key: model.get(name) for key, name in OF_MODEL.items()},
        FIRST: first_weights,
        "units": units,
        "dtype": dtype,
        "data consistency": correction
        and (correction.name or [correction.lam, correction.iterations]),
        STEPS: _steps(steps),
    }


def maps_that_stay(
    derivative: Derivative,
    recordings: list[Recording],
    wanted: dict[str, Any],
    *,
    force: bool,
    resume: bool,
) -> list[Recording]:
    """Return the recordings whose maps exist and are to be kept.

    What killed processes left beside any of them is undone and removed first.

    Raises
    ------
    UsageError
        If maps exist and nothing says what becomes of them, or they are to be kept although
        they were made otherwise.
    """
    for folder in {derivative.chi(r).parent for r in recordings}:
        clear_leftovers(folder)
    existing = [r for r in recordings if is_there(derivative.chi(r))]
    if force or not existing:
        return []
    if not resume:
        raise UsageError(
            f"{len(existing)} of {len(recordings)} maps exist, {derivative.chi(existing[0])} "
            "first; pass --resume to keep them or --force to make them again"
        )
    for recording in existing:
        sidecar = derivative.sidecar(recording)
        made = _made_facts(load_json_object(sidecar) if os.path.lexists(sidecar) else {})
        for name, value in wanted.items():
            if name == STEPS:
                value = None if recording.source == "localfield" else value
                if None in (value, made[name]) and recording.source != "localfield":
                    continue  # a network that begins before the local field
            if made[name] != value:
                raise UsageError(
                    f"{sidecar}: {name} {_text(made[name])}, this run has {_text(value)}: "
                    "--resume adds to maps that were made alike; choose another --output or pass "
                    "--force"
                )
    return existing


def _made_facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    model, step = _object(sidecar, "model"), _object(sidecar, "data_consistency")
    first = _object(_object(sidecar, "first_part"), "model") or None
    return {
        **{key: model.get(name) for key, name in OF_MODEL.items()},
        FIRST: first and f"{first.get('precision')}, {first.get('weights_sha256')}",
        "units": sidecar.get("units"),
        "dtype": sidecar.get("dtype", "float32"),  # all there was at first
        "data consistency": _object(sidecar, "asked_for").get("data_consistency")
        or ([step.get("lambda"), step.get("iterations")] if step else None),
        STEPS: _steps(_object(_object(sidecar, "local_field"), "steps")),
    }


def is_there(chi: Path) -> bool:
    """Return whether there is a map, or a link to one; an empty file is none."""
    return os.path.lexists(chi) and not (chi.is_file() and chi.stat().st_size == 0)


def _steps(said: dict[str, Any]) -> dict[str, Any] | None:
    """Return what decides a local field of what is said of its steps, wherever it was made."""
    if not said:
        return None
    background = {k: v for k, v in _object(said, "background").items() if k != "by"}
    return {**_object(said, "quality"), **background}


def _object(sidecar: dict[str, Any], name: str) -> dict[str, Any]:
    value = sidecar.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
