"""From a command to its exit code: what a user can meet is one line, a bug is a trace."""

import os
import signal
import sys
from collections.abc import Callable

from qsm_deploy.kernels.errors import MemoryLimitError, QsmDeployError

INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 141  # 128 + SIGPIPE, which Windows lacks


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run a command line's work and return its exit code.

    An error that a user can meet is printed on stderr as ``name: error: ...``. Everything else
    is a bug and keeps its trace.

    Parameters
    ----------
    name
        The program's, as the user typed it.
    command
        Does the work, returns 0 or another exit code.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except QsmDeployError as error:
        return _fail(name, str(error), error.exit_code)
    except MemoryError as error:
        reason = f"out of memory ({str(error) or 'no size given'}); use a smaller volume or patches"
        return _fail(name, reason, MemoryLimitError.exit_code)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # `| head` has seen enough; what the interpreter still flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _fail(name: str, message: str, code: int) -> int:
    sys.stderr.write(f"{name}: error: {' '.join(message.split())}\n")
    return code
