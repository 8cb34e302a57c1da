"""What is seen of a network on calibration maps, and what the user chose about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qsm_deploy.calibration.int8.activations import collect_histograms, multiply_accumulates
from qsm_deploy.calibration.int8.collectors import Collector, Histogram, collect_range
from qsm_deploy.calibration.int8.layers import FloatGraphs, int8_layers
from qsm_deploy.calibration.int8.patches import CalibrationPatch, sample_patches
from qsm_deploy.calibration.int8.qdq import Int8Layer, Quantiser
from qsm_deploy.calibration.int8.search import Budget
from qsm_deploy.calibration.int8.volumes import CalibrationData, load_calibration
from qsm_deploy.kernels.errors import DataError, ExportError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.terminal import Progress, no_progress
from qsm_deploy.runtime.scan.unit_names import FieldUnit
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
    graphs
        Of the network.
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

    graphs: FloatGraphs
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
        return Quantiser.from_model(self.graphs.exact, self.candidates, amax)


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
    graphs: FloatGraphs,
    card: ModelCard,
    data: CalibrationData,
    choices: Int8Choices,
    open_exact: Callable[[], Session],
    say: Callable[[str], None] = lambda line: None,
) -> Calibrated:
    """Collect histograms of what may be in INT8.

    Parameters
    ----------
    graphs, card
        The network.
    data
        What to calibrate on.
    choices
        Of the user.
    open_exact
        Opens the network in FP32; called only if it has to run as a whole.
    say
        Called with the name of each stage.

    Raises
    ------
    ExportError
        If nothing in the network may be in INT8.
    DataError
        If the calibration data cannot serve.
    """
    candidates = int8_layers(graphs.exact.graph, graphs.reduced)
    if not candidates:
        raise ExportError("nothing in this network may be in INT8; export it in fp16")
    patches = sample_patches(
        *(card, data.scans, open_exact),
        count=choices.patches,
        seed=choices.seed,
        progress=choices.progress,
    )
    say(f"measuring activations in {len(patches)} patches")
    tensors = {layer.activation for layer in candidates}
    histograms = collect_histograms(graphs.exact, tensors, patches, choices.progress)
    # an activation that is dead here may live elsewhere, and has no range
    candidates = [layer for layer in candidates if histograms[layer.activation].largest > 0]
    if not candidates:
        raise DataError("this network returns nothing but zeros on the calibration data")
    fullest = max(patches, key=lambda patch: int(np.count_nonzero(patch.mask)))
    macs = multiply_accumulates(graphs.exact, fullest.tensors)
    return Calibrated(graphs, tuple(candidates), data, histograms, fullest, macs)
