"""What a card says of a file in INT8: rounded truly in PyTorch, and run in the backends."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qsm_deploy.export.int8.choice import Int8Result
from qsm_deploy.kernels.errors import AccuracyError
from qsm_deploy.runtime.card.card import Verification
from qsm_deploy.runtime.sessions.open import (
    open_session,
)
from qsm_deploy.runtime.sessions.session import Backend

# Backends do not round to FP16, so that some values fall on the other side of a step of INT8.
TOLERANCE = 1.5
LARGE_PPB = 100.0


def verify_int8(
    found: Int8Result,
    draft: Path,
    backends: Sequence[Backend],
    say: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Return the error of a file in INT8, by the acquisitions that its layers were chosen on.

    Parameters
    ----------
    found
        What was chosen; its error holds the budget.
    draft
        The file.
    backends
        Those that run it.
    say
        Called with each backend's error.

    Raises
    ------
    AccuracyError
        If a backend's error is above the budget by more than half.
    """
    budget = found.choices.budget
    reference = (
        f"pytorch in fp32, against int8 and fp16 rounded in pytorch on a phantom and on "
        f"calibration data: {found.error}"
    )
    largest = found.error.max_ppb
    if largest > LARGE_PPB and found.choices.collector != "max":
        say(
            f"note: up to {largest:.2g} ppb off, most likely in a calcification or bleed whose "
            "activations are clipped to their range; --collector max clips nothing"
        )
    for backend in backends:
        error = found.evaluation.session_error(open_session(draft, backend))
        say(f"{backend}: {error}")
        if not (
            error.median_ppb <= TOLERANCE * budget.median_ppb
            and error.xsim_change <= TOLERANCE * budget.xsim
            and error.max_ppb <= TOLERANCE * budget.max_ppb
        ):
            raise AccuracyError(
                f"{backend} does not run this file as it says: {error}, the budget is {budget}; "
                "nothing was written"
            )
        reference += f"; median {error.median_ppb:.2g} ppb in {backend}"
        largest = max(largest, error.max_ppb)
    return Verification(reference, largest, found.evaluation.shapes)
