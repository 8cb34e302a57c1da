"""From a command to its exit code: what a user can meet is one line, a bug is a trace."""

import argparse
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from typing import Any

from qsm_deploy.kernels.errors import (
    DataError,
    MemoryLimitError,
    MissingDependencyError,
    QsmDeployError,
)
from qsm_deploy.runtime.console.time_limit import is_left_behind

INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 141  # 128 + SIGPIPE, which Windows lacks


def run_command(name: str, command: Callable[[], str]) -> int:
    """Run a command line's work, print its result, and return its exit code.

    An error that a user can meet is printed on stderr as ``name: error: ...``. Everything else
    is a bug and keeps its trace.

    Parameters
    ----------
    name
        The program's, as the user typed it.
    command
        Does the work and returns what goes to stdout.
    """
    # a process started without them has None here, which nothing that prints expects
    sys.stdout, sys.stderr = sys.stdout or StringIO(), sys.stderr or StringIO()
    code = _exit_code(name, command)
    if is_left_behind() and os.path.basename(sys.argv[0]) == name:  # nobody else's process
        sys.stdout.flush()
        os._exit(code)
    return code


def _exit_code(name: str, command: Callable[[], str]) -> int:
    try:
        return _print(name, command())
    except QsmDeployError as error:
        return fail(name, str(error), error.exit_code)
    except MemoryError as error:
        seen = str(error) or "no size given"
        reason = f"out of memory ({seen}); pass a smaller --patch or --memory-limit, or free memory"
        return fail(name, reason, MemoryLimitError.exit_code)
    except KeyboardInterrupt:
        return fail(name, "interrupted", INTERRUPTED)


NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """One that takes ``-1e-05`` for a number, which argparse takes for a flag before 3.14."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = NEGATIVE


class Version(argparse.Action):
    """``--version``: name and version of the program on stdout."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        """Print and leave; what knows the version is not imported for any other flag."""
        from qsm_deploy.runtime.console.provenance import version

        print(f"{parser.prog} {version()}")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add ``--version``, the same for every program."""
    parser.add_argument("--version", nargs=0, action=Version, help="show the version and leave")


def require_installed(
    modules: Iterable[str], extra: str, purpose: str, library: str | None = None
) -> None:
    """Refuse what needs modules that are not installed, without importing them.

    Raises
    ------
    MissingDependencyError
        If one is not; it is called as it is imported, or ``library``.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(library or module, extra, purpose)


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn a library that is not there into the name of the extra that brings it.

    Raises
    ------
    MissingDependencyError
        If the body imports what is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("qsm_deploy"):
            raise
        raise MissingDependencyError(error.name or "a library", extra, purpose) from error


def _print(name: str, result: str) -> int:
    if isinstance(sys.stdout, TextIOWrapper):  # names come out in the bytes that they have
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        try:
            print(result, end="\n" if result else "", flush=True)
        except UnicodeEncodeError:  # a terminal that lacks letters of it
            print(result.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError as error:
        # what the interpreter still flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            return READER_GONE
        return fail(name, f"cannot print the result ({error.strerror})", DataError.exit_code)
    return 0


def fail(name: str, message: str, code: int) -> int:
    """Print an error as one line on stderr and return the exit code."""
    sys.stderr.write(escaped(f"{name}: error: {' '.join(message.split())}") + "\n")
    return code


def escaped(text: str) -> str:
    """Return a text with escapes for what ends a line, steers a terminal or is no character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
