"""From calibration data to the layers of a network that go to INT8, or to the reason for none."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from qsm_deploy.calibration.activations import collect_histograms, multiply_accumulates
from qsm_deploy.calibration.box import middle_of
from qsm_deploy.calibration.collectors import Collector, collect_range
from qsm_deploy.calibration.histogram import Histogram
from qsm_deploy.calibration.map_error import MapError
from qsm_deploy.calibration.patches import CalibrationPatch, sample_patches
from qsm_deploy.calibration.progress import Progress, no_progress
from qsm_deploy.calibration.qdq import Int8Layer, is_quantised
from qsm_deploy.calibration.volumes import CalibrationData, load_calibration
from qsm_deploy.export.int8_evaluation import Int8Evaluation
from qsm_deploy.export.int8_search import Budget, Quantiser, search_layers
from qsm_deploy.export.int8_table import LayerRow, layer_rows
from qsm_deploy.export.networks.network import Network
from qsm_deploy.export.onnx_export import with_card
from qsm_deploy.export.precision_policy import int8_layers
from qsm_deploy.export.reduced_precision import with_precision
from qsm_deploy.export.rounding_error import calcified_scan
from qsm_deploy.kernels.errors import DataError, ExportError
from qsm_deploy.runtime.card import ModelCard
from qsm_deploy.runtime.scan import Scan
from qsm_deploy.runtime.session import Session, installed_backends, open_session
from qsm_deploy.runtime.units import FieldUnit

USEFUL_SHARE = 0.25  # of the multiply-accumulates; INT8 in fewer does not pay for its error
DEFAULT_COLLECTOR: Collector = "percentile-99.99"
PATCHES = 16


@dataclass(frozen=True)
class Int8Choices:
    """What the user chose about INT8.

    Attributes
    ----------
    calibration, units
        See :func:`qsm_deploy.calibration.volumes.load_calibration`.
    collector
        Makes ranges of histograms.
    patches, seed
        How many, and what decides where.
    budget
        What INT8 may cost.
    layers
        The file for the table of layers, if there is to be one.
    progress
        Shows how far it is.
    """

    calibration: str
    units: FieldUnit | None = None
    collector: Collector = DEFAULT_COLLECTOR
    patches: int = PATCHES
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    layers: Path | None = None
    progress: Progress = no_progress


@dataclass(frozen=True)
class Calibrated:
    """A network with what was seen of its activations.

    Attributes
    ----------
    model
        In FP32, of standard operators.
    candidates
        What may be in INT8, and whose activation is not zero throughout.
    data
        The acquisitions.
    histograms
        Of the candidates' activations, by tensor.
    patch
        That with the most of a head.
    macs
        Multiply-accumulates of each convolution in a patch.
    """

    model: onnx.ModelProto
    candidates: tuple[Int8Layer, ...]
    data: CalibrationData
    histograms: Mapping[str, Histogram]
    patch: CalibrationPatch
    macs: Mapping[str, int]

    def share(self, layers: Sequence[Int8Layer]) -> float:
        """Return the share of these layers in all multiply-accumulates of convolutions."""
        return sum(self.macs.get(layer.output, 0) for layer in layers) / sum(self.macs.values())

    def quantiser(self, collector: Collector) -> Quantiser:
        """Return what writes INT8 with a collector's ranges into a graph."""
        tensors = {layer.activation for layer in self.candidates}
        amax = {name: collect_range(self.histograms[name], collector) for name in tensors}
        return Quantiser.from_model(self.model, self.candidates, amax)


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
            f"INT8 keeps to the budget ({self.choices.budget}) with only {100 * self.share:.0f} % "
            f"of the multiply-accumulates (useful from {100 * USEFUL_SHARE:.0f} %); with all that "
            f"may be in INT8: {self.all_int8}; keeping fp16"
        )

    def quantised(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a graph in FP32 in INT8, FP16 and FP32."""
        made = self.quantiser.quantised(with_precision(model, "fp16"), self.layers)
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


def read_calibration(
    card: ModelCard, choices: Int8Choices, say: Callable[[str], None] = lambda line: None
) -> CalibrationData:
    """Read the calibration data, and say what the user should know of it.

    Raises
    ------
    DataError
        If it cannot serve; see :func:`qsm_deploy.calibration.volumes.load_calibration`.
    """
    say(f"reading the calibration data, {choices.calibration}")
    data = load_calibration(choices.calibration, card, choices.units, progress=choices.progress)
    for note in data.notes:
        say(f"note: {note}")
    return data


def choose_int8(
    model: onnx.ModelProto,
    module: Network,
    card: ModelCard,
    data: CalibrationData,
    choices: Int8Choices,
    say: Callable[[str], None] = lambda line: None,
) -> Int8Result:
    """Calibrate, measure and demote.

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
    calibrated = calibrate(model, card, data, choices, say)
    say("measuring what each layer costs in INT8")
    evaluation = Int8Evaluation(module, card, evaluation_scans(card, calibrated.data))
    return decide(calibrated, evaluation, choices)


def calibrate(
    model: onnx.ModelProto,
    card: ModelCard,
    data: CalibrationData,
    choices: Int8Choices,
    say: Callable[[str], None] = lambda line: None,
) -> Calibrated:
    """Collect histograms of what may be in INT8; see :func:`choose_int8`."""
    candidates = int8_layers(model.graph)
    if not candidates:
        raise ExportError("nothing in this network may be in INT8; export it in fp16")
    with tempfile.TemporaryDirectory(prefix="qsm-export-") as folder:
        patches = sample_patches(
            card,
            data.scans,
            lambda: _session(model, card, Path(folder)),
            count=choices.patches,
            seed=choices.seed,
            progress=choices.progress,
        )
    say(f"measuring activations in {len(patches)} patches")
    tensors = {layer.activation for layer in candidates}
    histograms = collect_histograms(model, tensors, patches, choices.progress)
    # an activation that is dead here may live elsewhere, and has no range
    candidates = [layer for layer in candidates if histograms[layer.activation].largest > 0]
    if not candidates:
        raise DataError("this network returns nothing but zeros on the calibration data")
    fullest = max(patches, key=lambda patch: int(np.count_nonzero(patch.mask)))
    macs = multiply_accumulates(model, fullest.tensors)
    return Calibrated(model, tuple(candidates), data, histograms, fullest, macs)


def decide(calibrated: Calibrated, evaluation: Int8Evaluation, choices: Int8Choices) -> Int8Result:
    """Measure each layer and demote; see :func:`choose_int8`."""
    quantiser = calibrated.quantiser(choices.collector)
    found = search_layers(
        *(calibrated.model, calibrated.candidates, quantiser, evaluation, calibrated.patch),
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
        layer_rows(calibrated.model, calibrated.candidates, found, quantiser.amax, calibrated.macs),
        calibrated.data.sha256,
        evaluation,
    )


def evaluation_scans(card: ModelCard, data: CalibrationData) -> list[Scan]:
    """Return the box around a phantom's calcification, and the middle of the last acquisition."""
    calcified = calcified_scan(card)
    return [calcified, middle_of(data.scans[-1], max(calcified.mask.shape), card.divisor)]


def _session(model: onnx.ModelProto, card: ModelCard, folder: Path) -> Session:
    path = folder / "fp32.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    path.write_bytes(with_card(copy, card))
    return open_session(path, installed_backends()[0])
