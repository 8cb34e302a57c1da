"""Name and version of this package, as written into everything it makes."""

import importlib.metadata


def made_by() -> str:
    """Return ``qsm-deploy`` and its version."""
    return f"qsm-deploy {importlib.metadata.version('qsm-deploy')}"
