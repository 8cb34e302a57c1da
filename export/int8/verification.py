"""INT8 against PyTorch: which layers of a network go to it, and what a card says of the file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from qsm_deploy.calibration.int8.calibration import Int8Choices
from qsm_deploy.calibration.int8.choice import Int8Result, choose_int8
from qsm_deploy.calibration.int8.evaluation import Int8Evaluation, middle_of
from qsm_deploy.calibration.int8.layers import FloatGraphs
from qsm_deploy.calibration.int8.qdq import is_quantised
from qsm_deploy.calibration.int8.volumes import CalibrationData
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.graph.rounded_run import RoundedRun
from qsm_deploy.export.measure.rounding import calcified_scan, rounded_session
from qsm_deploy.export.measure.verification import ModuleSession
from qsm_deploy.export.networks.network import Network
from qsm_deploy.kernels.errors import AccuracyError, ExportError
from qsm_deploy.runtime.card.card import ModelCard, Verification
from qsm_deploy.runtime.console.held import scratch_folder
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.int8 import INT8_IN, sums_in_int32
from qsm_deploy.runtime.sessions.open import installed_backends, open_session
from qsm_deploy.runtime.sessions.session import BACKENDS, Backend, Session

# Backends do not round to FP16, so that some values fall on the other side of a step of INT8.
TOLERANCE = 1.5
LARGE_PPB = 100.0


def find_int8(
    model: onnx.ModelProto,
    module: Network,
    card: ModelCard,
    data: CalibrationData,
    choices: Int8Choices,
    say: Callable[[str], None] = lambda line: None,
) -> Int8Result:
    """Calibrate a network, measure it against PyTorch and demote.

    Parameters
    ----------
    model
        The network's graph in FP32, of standard operators.
    module
        The network, in evaluation mode.
    card
        Its card, for FP32.
    data
        What to calibrate on.
    choices
        Of the user.
    say
        Called with the name of each stage.

    Raises
    ------
    ExportError
        If the graph is quantised already, or nothing in it may be in INT8.
    DataError
        If the calibration data cannot serve.
    """
    if is_quantised(model):
        raise ExportError("this network is quantised already; export its weights in floating point")
    evaluation = evaluation_of(module, card, evaluation_scans(card, data))
    with scratch_folder() as folder:
        path = folder / "fp32.onnx"
        return choose_int8(
            *(float_graphs(model), evaluation, card, data, choices),
            *(lambda: exact_session(model, card, path), say),
        )


def float_graphs(model: onnx.ModelProto) -> FloatGraphs:
    """Return a graph in FP32 beside itself in FP16."""
    return FloatGraphs(model, with_precision(model, "fp16"), reducible_nodes(model.graph))


def evaluation_of(module: Network, card: ModelCard, scans: Sequence[Scan]) -> Int8Evaluation:
    """Return what judges graphs of a network by what PyTorch makes of these acquisitions."""
    reference = ModuleSession(module, card)
    return Int8Evaluation(reference, lambda graph: rounded_session(RoundedRun(graph), card), scans)


def evaluation_scans(card: ModelCard, data: CalibrationData) -> list[Scan]:
    """Return the box around a phantom's calcification, and the middle of the last acquisition."""
    calcified = calcified_scan(card)
    return [calcified, middle_of(data.scans[-1], max(calcified.mask.shape), card.divisor)]


def exact_session(model: onnx.ModelProto, card: ModelCard, path: Path) -> Session:
    """Open a graph in FP32 as the runtime does, by a file that is written for it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    path.write_bytes(with_card(copy, card))
    return open_session(path, installed_backends()[0])


def verify_int8(
    found: Int8Result,
    draft: Path,
    backends: Sequence[Backend],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Verification, dict[str, str]]:
    """Return the error of a file in INT8, by the acquisitions that its layers were chosen on.

    The card's option of the backends that are accurate in INT8 too comes with it.

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
    accurate = []
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
        if "int8" in BACKENDS[backend].precisions and sums_in_int32():
            error = found.evaluation.session_error(open_session(draft, backend, precision="int8"))
            if budget.holds(error):
                accurate.append(backend)
                largest = max(largest, error.max_ppb)
                say(f"{backend} in INT8: {error}")
                continue
            say(f"{backend} in INT8: {error}, the budget is {budget}")
        say(f"{backend} will compute this file in FP32")
    options = {INT8_IN: " ".join(accurate)} if accurate else {}
    return Verification(reference, largest, found.evaluation.shapes), options
