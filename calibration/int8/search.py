"""Which layers go to INT8: each is tried alone, then the most harmful fall back to FP16.

The accuracy budget decides. What starts in higher precision, see
:mod:`qsm_deploy.calibration.int8.layers`, stays there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from qsm_deploy.calibration.budgets import DEFAULTS
from qsm_deploy.calibration.graph.graph_run import GraphRun
from qsm_deploy.calibration.int8.activations import coarsened
from qsm_deploy.calibration.int8.evaluation import Int8Evaluation
from qsm_deploy.calibration.int8.layers import FloatGraphs
from qsm_deploy.calibration.int8.map_error import MapError
from qsm_deploy.calibration.int8.patches import CalibrationPatch
from qsm_deploy.calibration.int8.qdq import Int8Layer, Quantiser, fused_layers
from qsm_deploy.runtime.console.terminal import Progress, no_progress

STEPS = 16  # in which the rest is demoted where FP16 rounding asks for more


@dataclass(frozen=True)
class Budget:
    """What INT8 may cost.

    Attributes
    ----------
    median_ppb, max_ppb
        The median and the largest in-mask error. The largest is where a lesion was clipped: the
        judged box has a calcification of -3.3 ppm, which stays within 6 % by default.
    xsim
        The change of XSIM.
    """

    median_ppb: float = DEFAULTS["int8"]["median_ppb"]
    xsim: float = DEFAULTS["int8"]["xsim_drop"]
    max_ppb: float = DEFAULTS["int8"]["max_ppb"]

    def holds(self, error: MapError) -> bool:
        """Tell whether an error is within it; one that is not a number is not."""
        return self.spent(error) <= 1

    def spent(self, error: MapError) -> float:
        """Return the share of it that an error takes, infinite for one that is not a number."""
        shares = (
            error.median_ppb / self.median_ppb,
            error.max_ppb / self.max_ppb,
            error.xsim_change / self.xsim,
        )
        return math.inf if any(map(math.isnan, shares)) else max(shares)

    def __str__(self) -> str:
        return f"median {self.median_ppb:g} ppb, max {self.max_ppb:g} ppb, XSIM {self.xsim:g}"


@dataclass(frozen=True)
class Sensitivity:
    """One layer alone in INT8: SQNR at its output [dB], and the error of the map."""

    sqnr_db: float
    error: MapError


@dataclass(frozen=True)
class Found:
    """What the search ended with.

    Attributes
    ----------
    layers
        In INT8.
    sensitivities
        Of all candidates, by output.
    error, all_int8, fp16
        Of these layers, of all candidates, and of none in INT8.
    """

    layers: tuple[Int8Layer, ...]
    sensitivities: Mapping[str, Sensitivity]
    error: MapError
    all_int8: MapError
    fp16: MapError


def search_layers(
    graphs: FloatGraphs,
    candidates: Sequence[Int8Layer],
    quantiser: Quantiser,
    evaluation: Int8Evaluation,
    patch: CalibrationPatch,
    budget: Budget,
    progress: Progress = no_progress,
) -> Found:
    """Return as many candidates as the budget allows.

    Where to stop is looked for in FP32 with Q/DQ, which is quick; what holds there must hold in
    FP16 with true rounding, else more layers are demoted.

    Parameters
    ----------
    graphs
        Of the network.
    candidates
        What may be in INT8.
    quantiser
        Knows their ranges.
    evaluation
        Judges; the last acquisition alone measures what one layer does to the map.
    patch
        Where the SQNR is measured, in the mask.
    budget
        What holds at the end, unless even FP16 is worse.
    progress
        Shows how far it is.
    """
    model, half = graphs.exact, graphs.half
    alone = _sensitivities(model, candidates, quantiser, evaluation, patch, progress)
    by_harm = sorted(candidates, key=lambda layer: -budget.spent(alone[layer.output].error))

    def left(demoted: int) -> list[Int8Layer]:
        kept = {layer.output for layer in by_harm[demoted:]}
        return fused_layers([layer for layer in candidates if layer.output in kept])

    def holds_quickly(demoted: int) -> bool:
        return budget.holds(evaluation.quick_error(quantiser.quantised(model, left(demoted))))

    def rounded(demoted: int) -> MapError:
        layers = left(demoted)
        return evaluation.rounded_error(quantiser.quantised(half, layers) if layers else half)

    every = len(by_harm)
    all_int8, fp16 = rounded(0), rounded(every)
    demoted, error = 0, all_int8
    if not budget.holds(all_int8):
        demoted = max(1, fewest(every, holds_quickly))
        error = rounded(demoted)
        while demoted < every and not budget.holds(error):
            demoted = min(every, demoted + math.ceil(every / STEPS))
            error = rounded(demoted)
    return Found(tuple(left(demoted)), alone, error, all_int8, fp16)


def fewest(most: int, holds: Callable[[int], bool]) -> int:
    """Return the fewest demotions after which a budget holds, ``most`` if it never does.

    More demotions are taken to do no harm, so that halving finds them.
    """
    low, high = 0, most  # fewer than low do not hold
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _sensitivities(
    model: onnx.ModelProto,
    candidates: Sequence[Int8Layer],
    quantiser: Quantiser,
    evaluation: Int8Evaluation,
    patch: CalibrationPatch,
    progress: Progress,
) -> dict[str, Sensitivity]:
    outputs = [layer.output for layer in candidates]
    exact = dict(zip(outputs, _in_mask(model, outputs, patch), strict=True))
    found = {}
    for layer in progress(candidates, "one layer at a time in INT8"):
        alone = quantiser.quantised(model, [layer])
        (got,) = _in_mask(alone, [layer.output], patch)
        error = evaluation.quick_error(alone, last=True)
        found[layer.output] = Sensitivity(sqnr_db(exact[layer.output], got), error)
    return found


def _in_mask(
    model: onnx.ModelProto, names: Sequence[str], patch: CalibrationPatch
) -> list[NDArray[np.float32]]:
    found = GraphRun(model, names).look(patch.tensors)
    return [value[0][:, coarsened(patch.mask, value.shape[2:])] for value in found]


def sqnr_db(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return signal power over that of the quantisation error [dB], infinite without an error."""
    signal = float(np.sum(np.square(exact, dtype=np.float64)))
    noise = float(np.sum(np.square(got.astype(np.float64) - exact)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.divide(signal, noise)))
