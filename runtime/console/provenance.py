"""Name and version of this package, as written into everything it makes."""

import importlib.metadata

NAME = "qsm-deploy"


def version() -> str:
    """Return the version that is installed; the source alone may be on the path."""
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def made_by() -> str:
    """Return ``qsm-deploy`` and its version."""
    return f"{NAME} {version()}"
