"""From calibration data to the layers of a network that go to INT8, or to the reason for none."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from qsm_deploy.calibration.int8.calibration import Calibrated, Int8Choices, calibrate
from qsm_deploy.calibration.int8.evaluation import Int8Evaluation
from qsm_deploy.calibration.int8.layers import FloatGraphs
from qsm_deploy.calibration.int8.map_error import MapError
from qsm_deploy.calibration.int8.qdq import Int8Layer, Quantiser
from qsm_deploy.calibration.int8.search import search_layers
from qsm_deploy.calibration.int8.table import LayerRow, layer_rows
from qsm_deploy.calibration.int8.volumes import CalibrationData
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.sessions.session import Session

USEFUL_SHARE = 0.25  # of the multiply-accumulates; INT8 in fewer does not pay for its error


@dataclass(frozen=True)
class Int8Result:
    """What was decided, and what it was decided by.

    Attributes
    ----------
    choices
        As they were.
    quantiser
        Writes the layers into a graph.
    layers
        Those in INT8.
    share
        Of the multiply-accumulates of all convolutions, those in INT8.
    error, all_int8, fp16
        Of these layers, of all that may be in INT8, and of none.
    rows
        One for each layer.
    calibration_sha256
        Of the data.
    evaluation
        What the errors were measured with.
    """

    choices: Int8Choices
    quantiser: Quantiser
    layers: tuple[Int8Layer, ...]
    share: float
    error: MapError
    all_int8: MapError
    fp16: MapError
    rows: tuple[LayerRow, ...]
    calibration_sha256: str
    evaluation: Int8Evaluation

    @property
    def why_not(self) -> str | None:
        """Why the network is better left in FP16; ``None`` if it is not."""
        if self.share >= USEFUL_SHARE:
            return None
        return (
            f"INT8 keeps to the budget ({self.choices.budget}) with only {100 * self.share:.1f} % "
            f"of the multiply-accumulates (useful from {100 * USEFUL_SHARE:.0f} %); with all that "
            f"may be in INT8: {self.all_int8}; keeping fp16"
        )

    def quantised(self, half: onnx.ModelProto) -> onnx.ModelProto:
        """Return a graph in FP16 where that is tolerated with the layers in INT8."""
        made = self.quantiser.quantised(half, self.layers)
        onnx.checker.check_model(made, full_check=True)
        return made

    def card_options(self) -> dict[str, str]:
        """Return what the card says of it."""
        return {
            "calibration_sha256": self.calibration_sha256,
            "collector": self.choices.collector,
            "budget": str(self.choices.budget),
            "int8_share": f"{self.share:.3f}",
        }


def choose_int8(
    graphs: FloatGraphs,
    evaluation: Int8Evaluation,
    card: ModelCard,
    data: CalibrationData,
    choices: Int8Choices,
    open_exact: Callable[[], Session],
    say: Callable[[str], None] = lambda line: None,
) -> Int8Result:
    """Calibrate, measure and demote.

    Parameters
    ----------
    evaluation
        Judges graphs of the network.
    graphs, card, data, choices, open_exact, say
        As for :func:`qsm_deploy.calibration.int8.calibration.calibrate`, whose errors it raises.
    """
    calibrated = calibrate(graphs, card, data, choices, open_exact, say)
    say("measuring what each layer costs in INT8")
    return decide(calibrated, evaluation, choices)


def decide(calibrated: Calibrated, evaluation: Int8Evaluation, choices: Int8Choices) -> Int8Result:
    """Measure each layer and demote; see :func:`choose_int8`."""
    quantiser = calibrated.quantiser(choices.collector)
    found = search_layers(
        *(calibrated.graphs, calibrated.candidates, quantiser, evaluation, calibrated.patch),
        *(choices.budget, choices.progress),
    )
    return Int8Result(
        choices,
        quantiser,
        found.layers,
        calibrated.share(found.layers),
        found.error,
        found.all_int8,
        found.fp16,
        layer_rows(calibrated, found, quantiser.amax),
        calibrated.data.sha256,
        evaluation,
    )
