"""Name and version of this package, as written into everything it makes."""

import importlib.metadata

NAME = "qsm-deploy"


def version() -> str:
    """Return the version that is installed."""
    return importlib.metadata.version(NAME)


def made_by() -> str:
    """Return ``qsm-deploy`` and its version."""
    return f"{NAME} {version()}"
