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
from functools import cached_property
from typing import Any

from qsm_deploy.kernels.errors import (
    DataError,
    EngineError,
    MemoryLimitError,
    QsmDeployError,
    UsageError,
)
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.outcomes import Outcome, outcome_from
from qsm_deploy.runtime.cohort.reconstructing import Facts
from qsm_deploy.runtime.job.memory_limit import HELP
from qsm_deploy.runtime.reconstruction.memory import available_bytes

CHILD = "qsm_deploy.runtime.cohort.child"
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
    def is_memory(self) -> bool:
        """Whether that is how the system ends what takes too much memory."""
        return self.code == -signal.SIGKILL


class _Child:
    """A process that answers a line with a line."""

    def __init__(self, cohort: Cohort, *, quiet: bool) -> None:
        threads = dict.fromkeys(THREADS, str(cohort.host.threads)) if cohort.host.threads else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads,
            start_new_session=True,  # or an interrupt at the terminal would reach it, too
        )
        self._say({"cohort": base64.b64encode(pickle.dumps(cohort)).decode(), "quiet": quiet})

    @cached_property
    def facts(self) -> Facts:
        """What it knows of all maps, as soon as it has opened what makes them.

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
        return Facts(**hello)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request.

        Raises
        ------
        ChildDied
            If the process ends without one.
        QsmDeployError
            If it could not open what makes the maps.
        """
        assert self.facts
        self._say(request)
        return self._heard()

    def _say(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise ChildDied(self._ended())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end, at once if it is only opening, and wait for that."""
        if "facts" not in vars(self):
            self.kill()
        self._ended()

    def _ended(self) -> int:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
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
        """Start a child, unless there is one."""
        if self._child is None:
            self._child = _Child(self._cohort, quiet=self._quiet)

    def open(self) -> Facts:
        """Start a child, unless there is one, and return what it knows of all maps.

        Raises
        ------
        QsmDeployError
            As :class:`CohortReconstructor`, or if the child dies.
        """
        self.start()
        assert self._child is not None
        try:
            return self._child.facts
        except (ChildDied, QsmDeployError) as error:
            self._child = None
            if not isinstance(error, ChildDied):
                raise
            kind = MemoryLimitError if error.is_memory else EngineError
            raise kind(f"{error}, before it had opened the model; {HELP}") from error

    def outcome(self, name: str, *, wait: bool) -> Outcome:
        """Reconstruct a recording, whatever comes of it.

        Should the process die, it is tried once more in a fresh one with half the memory, in
        patches if need be. What the product refuses is the same a second time, and not tried.
        """
        attempts = []
        for attempt, cohort in enumerate((self._cohort, careful(self._cohort)), 1):
            try:
                if self._child is None:
                    self._child = _Child(cohort, quiet=self._quiet)
                answer = self._child.ask({"recording": name, "wait": wait})
            except ChildDied as died:
                self._child = None
                attempts.append(died)
                if self._killed:
                    break
                continue
            except QsmDeployError as error:  # as it opened
                self._child = None
                return Outcome(name, "failed", exit_code=error.exit_code, reason=str(error))
            if attempt > 1:
                self.close()
            return replace(outcome_from(answer), attempt=attempt)
        last = attempts[-1]
        kind = MemoryLimitError if last.is_memory else EngineError
        help_ = f"; the system does that where memory runs out: {HELP}" if last.is_memory else ""
        reason = f"{last}, and so did a second one with half the memory{help_}"
        return Outcome(name, "failed", exit_code=kind.exit_code, reason=reason, attempt=2)

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
    limit = (wants.memory_limit or int(available_bytes())) // 2
    patches = replace(wants.patches, patch="auto")
    return replace(cohort, wants=replace(wants, patches=patches, memory_limit=limit))
