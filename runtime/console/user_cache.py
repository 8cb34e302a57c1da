"""Where what can be made again is kept for a user."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where the user's caches are, as the XDG specification says.

    Of a user without a home it is no folder, and none can be made there.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = stated if stated.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        base = Path(os.devnull)
    return base / "qsm-deploy"
