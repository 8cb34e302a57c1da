"""Nothing of a patient in the log, whoever writes into it."""

import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress

from qsm_deploy.runtime.serve.texts import one_line

UID = re.compile(r"\d+(?:\.\d+){4,}")


def quiet_libraries(log: Callable[[str], object]) -> None:
    """Silence what libraries print of data sets, for the whole process.

    Parameters
    ----------
    log
        Takes a line about a fault in a thread, which would print what it met.
    """
    from pynetdicom import _config

    _config.LOG_HANDLER_LEVEL = "none"
    for library in ("pynetdicom", "pydicom", "highdicom"):
        logger = logging.getLogger(library)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    warnings.simplefilter("ignore")

    def fault(seen: threading.ExceptHookArgs) -> None:
        if seen.exc_value is not None:
            log(f"a thread ended: {place_of(seen.exc_value)}")

    threading.excepthook = fault


def place_of(error: BaseException) -> str:
    """Return of what kind a fault is and where it happened, and nothing of what it met."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "qsm_deploy" in frame.filename] or frames
    where = f" in {ours[-1].name}, line {ours[-1].lineno}" if ours else ""
    return f"a fault in the program ({type(error).__name__}{where})"


def shown(text: str) -> str:
    """Return a sentence as a line of the log, without UIDs and what cannot be shown."""
    return one_line(UID.sub("(a UID)", text))


def write_line(line: str) -> None:
    """Write a line of the log; a full disk is no reason to stop."""
    with suppress(OSError):
        sys.stderr.write(f"qsm-serve: {shown(line)}\n")
        sys.stderr.flush()
