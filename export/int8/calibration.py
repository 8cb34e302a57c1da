"""What is seen of a network on calibration maps, and what the user chose about it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from qsm_deploy.calibration.int8.activations import collect_histograms, multiply_accumulates
from qsm_deploy.calibration.int8.collectors import Collector, collect_range
from qsm_deploy.calibration.int8.histogram import Histogram
from qsm_deploy.calibration.int8.patches import CalibrationPatch, sample_patches
from qsm_deploy.calibration.int8.qdq import Int8Layer
from qsm_deploy.calibration.int8.volumes import CalibrationData, load_calibration
from qsm_deploy.calibration.progress import Progress, no_progress
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.export.graph.precision_policy import int8_layers
from qsm_deploy.export.int8.search import Budget, Quantiser
from qsm_deploy.kernels.errors import DataError, ExportError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.scan.units import FieldUnit
from qsm_deploy.runtime.sessions.open import (
    installed_backends,
    open_session,
)
from qsm_deploy.runtime.sessions.session import Session

DEFAULT_COLLECTOR: Collector = "mse"  # clips a calcification a third as much as percentiles
PATCHES = 16


@dataclass(frozen=True)
class Int8Choices:
    """What the user chose about INT8.

    Attributes
    ----------
    calibration, units
        See :func:`qsm_deploy.calibration.int8.volumes.load_calibration`.
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


def read_calibration(
    card: ModelCard, choices: Int8Choices, say: Callable[[str], None] = lambda line: None
) -> CalibrationData:
    """Read the calibration data, and say what the user should know of it.

    Raises
    ------
    DataError
        If it cannot serve; see :func:`qsm_deploy.calibration.int8.volumes.load_calibration`.
    """
    say(f"reading the calibration data, {choices.calibration}")
    data = load_calibration(choices.calibration, card, choices.units, progress=choices.progress)
    for note in data.notes:
        say(f"note: {note}")
    return data


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


def _session(model: onnx.ModelProto, card: ModelCard, folder: Path) -> Session:
    path = folder / "fp32.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    path.write_bytes(with_card(copy, card))
    return open_session(path, installed_backends()[0])
