"""A process that reconstructs recordings by name: ``python -m qsm_deploy.runtime.cohort.child``.

The first line on its stdin is a cohort (a pickle in base64), every further one a request in JSON;
each is answered by one line of JSON on stdout. It ends when its stdin does.
"""

import base64
import json
import os
import pickle
import signal
import sys
from dataclasses import asdict
from typing import Any, TextIO

from qsm_deploy.kernels.errors import DataError, MemoryLimitError, QsmDeployError
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.outcomes import Outcome
from qsm_deploy.runtime.cohort.reconstructing import CohortReconstructor
from qsm_deploy.runtime.console.terminal import TerminalLog


def main() -> int:
    """Answer requests until there are no more."""
    # what anything prints goes to stderr, or it would break the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # whoever gave the work decides what an interrupt means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = json.loads(sys.stdin.readline())
    cohort: Cohort = pickle.loads(base64.b64decode(first["cohort"]))
    try:
        log = TerminalLog(quiet=first["quiet"], draws=False)
        reconstructor = CohortReconstructor(cohort, log)
    except QsmDeployError as error:
        return _answer(answers, {"error": str(error), "exit_code": error.exit_code})
    except MemoryError:
        code = MemoryLimitError.exit_code
        return _answer(answers, {"error": "out of memory as it opened", "exit_code": code})
    _answer(answers, asdict(reconstructor.facts))
    for line in sys.stdin:
        request = json.loads(line)
        outcome = _outcome(reconstructor, request["recording"], wait=request["wait"])
        _answer(answers, asdict(outcome))
    return 0


def _outcome(reconstructor: CohortReconstructor, name: str, *, wait: bool) -> Outcome:
    try:
        recording = named(reconstructor.cohort, name)
    except QsmDeployError as error:
        return Outcome(name, "failed", exit_code=error.exit_code, reason=str(error))
    return reconstructor.outcome(recording, wait=wait)


def named(cohort: Cohort, name: str) -> Recording:
    """Return a recording of a cohort by its name; no subject's folder but its own is opened.

    Raises
    ------
    DataError
        If it is not there, or cannot be taken.
    """
    subject = name.partition("_")[0]
    found = cohort.only(subject).find()
    for recording in found.recordings:
        if recording.name == name:
            return recording
    raise DataError(found.failures.get(name) or found.failures.get(subject) or f"{name} is gone")


def _answer(answers: TextIO, content: dict[str, Any]) -> int:
    answers.write(json.dumps(content) + "\n")
    answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
