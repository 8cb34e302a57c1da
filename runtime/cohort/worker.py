"""A child process that reconstructs, and another one in its place when it dies.

What takes too much memory, or crashes in a library, takes nothing with it but its own map.
"""

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

from qsm_deploy.kernels.errors import (
    DataError,
    EngineError,
    MemoryLimitError,
    QsmDeployError,
    UsageError,
)
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.outcomes import Outcome, outcome_from
from qsm_deploy.runtime.cohort.reconstructing import Facts
from qsm_deploy.runtime.console.provenance import version
from qsm_deploy.runtime.job.memory_limit import HELP
from qsm_deploy.runtime.reconstruction.memory import available_bytes

# what is imported is never what lies in the current folder
CHILD = """\
import sys
sys.path[:] = filter(None, sys.path)
from qsm_deploy.runtime.cohort.child import main
main(int(sys.argv[1]))
"""
ERRORS = {e.exit_code: e for e in (UsageError, DataError, EngineError, MemoryLimitError)}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ChildDied(Exception):
    """A child that ended without an answer; ``code`` is its own, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        """Say how it ended."""
        if self.code >= 0:
            return f"its process ended with {self.code}"
        with suppress(ValueError):
            return f"its process died of signal {-self.code} ({signal.Signals(-self.code).name})"
        return f"its process died of signal {-self.code}"

    @property
    def kind(self) -> type[EngineError] | type[MemoryLimitError]:
        """What that is: the system kills what takes too much memory, all else is a crash."""
        return MemoryLimitError if self.code == -signal.SIGKILL else EngineError

    @property
    def help(self) -> str:
        """What a user can do about it."""
        is_memory = self.kind is MemoryLimitError
        return f"; the system does that where memory runs out: {HELP}" if is_memory else ""


class _Child:
    """A process that answers a line with a line."""

    def __init__(self, cohort: Cohort, *, quiet: bool) -> None:
        threads = dict.fromkeys(THREADS, str(cohort.host.threads)) if cohort.host.threads else {}
        answers, answered = os.pipe()
        said = _stderr()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(answered)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                pass_fds=[answered],
                text=True,
                env=os.environ | threads,
                start_new_session=True,  # or an interrupt at the terminal would reach it, too
            )
        except OSError as error:
            os.close(answers)
            raise EngineError(f"no process could be started: {error.strerror}") from error
        finally:
            os.close(answered)
        self._answers = os.fdopen(answers)
        self._is_open = False
        self._say({"cohort": _sendable(cohort), "quiet": quiet})

    def open(self) -> Facts:
        """Wait until it has opened what makes the maps, and return what they have alike.

        Raises
        ------
        QsmDeployError
            If that failed.
        ChildDied
            If it ended meanwhile.
        """
        hello = self._heard()
        if "error" in hello:
            self._ended()
            raise ERRORS.get(hello["exit_code"], QsmDeployError)(hello["error"])
        self._is_open = True
        return Facts(**hello)

    def outcome(self, recording: Recording, *, wait: bool) -> Outcome:
        """Return what became of a recording.

        Raises
        ------
        ChildDied
            If it ends without an answer.
        """
        self._say({"recording": _sendable(recording), "wait": wait})
        return outcome_from(self._heard())

    def _say(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _heard(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line.endswith("\n"):
            raise ChildDied(self._ended())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end, at once if it is only opening, and wait for that."""
        if not self._is_open:
            self.kill()
        self._ended()

    def _ended(self) -> int:
        self._answers.close()
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        return self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


class Worker:
    """Reconstructs recordings of a cohort, one at a time, in a child process.

    Parameters
    ----------
    cohort
        What is asked of all.
    quiet
        Whether its children print warnings only.
    """

    def __init__(self, cohort: Cohort, *, quiet: bool) -> None:
        self._cohort, self._quiet = cohort, quiet
        self._child: _Child | None = None
        self._killed = False

    def start(self) -> None:
        """Start a child, which then opens what makes the maps."""
        self._child = _Child(self._cohort, quiet=self._quiet)

    def open(self) -> Facts:
        """Start a child, unless that is done, and return what it knows of all maps.

        Raises
        ------
        QsmDeployError
            As :class:`CohortReconstructor`, or if the child dies.
        """
        if self._child is None:
            self.start()
        assert self._child is not None
        try:
            return self._child.open()
        except (ChildDied, QsmDeployError) as error:
            self._child = None
            if not isinstance(error, ChildDied):
                raise
            raise error.kind(f"{error}, before it had opened the model{error.help}") from error

    def outcome(self, recording: Recording, *, wait: bool) -> Outcome:
        """Reconstruct a recording, whatever comes of it.

        Should the process die, it is tried once more in a fresh one with half the memory, in
        patches if need be. What the product refuses is the same a second time, and not tried.
        """
        failed = Outcome(recording.name, "failed", version=version())
        try:
            if self._child is None:  # it died with the one before
                self.open()
            assert self._child is not None
            return self._child.outcome(recording, wait=wait)
        except QsmDeployError as error:  # as it opened
            return replace(failed, exit_code=error.exit_code, reason=str(error))
        except ChildDied as error:
            self._child, died = None, error
        reason = f"{died}{died.help}"
        if not self._killed:
            try:
                self._child = _Child(careful(self._cohort), quiet=self._quiet)
                self._child.open()
                return self._child.outcome(recording, wait=wait)
            except QsmDeployError:  # it cannot do with half
                pass
            except ChildDied as error:
                died = error
                reason = f"{died}, and so did a second one with half the memory{died.help}"
            finally:
                self.close()
        return replace(failed, exit_code=died.kind.exit_code, reason=reason, attempt=2)

    def close(self) -> None:
        """Let the child end when it is done."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def kill(self) -> None:
        """End the child at once, for good; what it was at is lost."""
        self._killed = True
        if self._child is not None:
            self._child.kill()


def careful(cohort: Cohort) -> Cohort:
    """Return a cohort that takes half the memory, in patches if need be."""
    wants = cohort.wants
    limit = wants.memory_limit
    if limit is None and not cohort.on_gpu:
        limit = int(available_bytes())
    patches = replace(wants.patches, patch="auto")
    halved = None if limit is None else limit // 2
    return replace(cohort, wants=replace(wants, patches=patches, memory_limit=halved), attempt=2)


def _sendable(content: object) -> str:
    return base64.b64encode(pickle.dumps(content)).decode()


def _stderr() -> int:
    """Return where a child says what it has to say, if this process has such a place."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
