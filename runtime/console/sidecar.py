"""Whose file it is that a map's sidecar would replace."""

import json
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.provenance import NAME


def require_replaceable(path: Path) -> None:
    """Refuse to put a sidecar where there is a file that is none, such as a model's card.

    Raises
    ------
    UsageError
        If there is such a file.
    """
    if path.is_file() and not _is_sidecar(path):
        raise UsageError(
            f"{path} is no sidecar of qsm-run, and the map's would replace it; choose another "
            "--output"
        )


def _is_sidecar(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict)
        and content.keys() >= {"units", "model"}  # which a model's card lacks
        and str(content.get("made_by")).startswith(NAME)
    )
