"""A process that reconstructs recordings, asked by lines of JSON on its stdin.

The first has a cohort, every further one a recording (pickles in base64); each is answered by one
line on a pipe of its own, which nothing prints on. It ends when its stdin does.
"""

import base64
import json
import os
import pickle
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from qsm_deploy.kernels.errors import MemoryLimitError, QsmDeployError
from qsm_deploy.runtime.cohort.reconstructing import CohortReconstructor
from qsm_deploy.runtime.console.terminal import TerminalLog


def main(answers: int) -> None:
    """Answer requests until there are no more.

    Parameters
    ----------
    answers
        The descriptor that they go to.
    """
    # whoever gave the work decides what an interrupt means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # who asked may be killed meanwhile
    with suppress(BrokenPipeError), os.fdopen(answers, "w") as pipe:

        def answer(content: dict[str, Any]) -> None:
            pipe.write(json.dumps(content) + "\n")
            pipe.flush()

        requests = map(json.loads, sys.stdin)
        for first in requests:
            log = TerminalLog(quiet=first["quiet"], draws=False)
            try:
                reconstructor = CohortReconstructor(_sent(first["cohort"]), log)
            except QsmDeployError as error:
                return answer({"error": str(error), "exit_code": error.exit_code})
            except MemoryError:
                code = MemoryLimitError.exit_code
                return answer({"error": "out of memory as it opened", "exit_code": code})
            answer(asdict(reconstructor.facts))
            break
        for request in requests:
            recording = _sent(request["recording"])
            answer(asdict(reconstructor.outcome(recording, wait=request["wait"])))


def _sent(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))
