"""Folders of a user: for what can be made again, and for what is to last."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where the user's caches are, as the XDG specification says.

    Of a user without a home it is no folder, and none can be made there.
    """
    return _folder("XDG_CACHE_HOME", ".cache")


def state_folder() -> Path:
    """Return the same for what a program keeps from one run to the next."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, at_home: str) -> Path:
    stated = Path(os.environ.get(variable, ""))
    try:
        base = stated if stated.is_absolute() else Path.home() / at_home
    except RuntimeError:
        base = Path(os.devnull)
    return base / "qsm-deploy"
