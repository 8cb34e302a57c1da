"""Where what can be made again is kept for a user."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where the user's caches are, as the XDG specification says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsm-deploy"
