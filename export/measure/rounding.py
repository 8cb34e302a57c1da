"""What a reduced precision costs a reconstruction, measured before any engine exists."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from qsm_deploy.calibration.budgets import rounding_budget
from qsm_deploy.calibration.graph.graph_run import GraphSession
from qsm_deploy.export.graph.rounded_run import RoundedRun
from qsm_deploy.export.measure.verification import (
    Difference,
    ModuleSession,
    apply_gate,
    phantom_scan,
)
from qsm_deploy.export.networks.network import Network
from qsm_deploy.kernels.bounding_box import box_at
from qsm_deploy.kernels.errors import AccuracyError
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.card.card import GraphPrecision, ModelCard, Verification
from qsm_deploy.runtime.metrics.difference import difference_ppb, distribution_ppb
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps
from qsm_deploy.runtime.reconstruction.tiles import plan_for
from qsm_deploy.runtime.scan.scan import Scan

# a box of an adult head with its calcification in the middle; small heads have smaller ones
HEAD, CORNER, SHAPE = (160, 160, 192), (68, 42, 84), (64, 64, 64)
LIMITS: Mapping[GraphPrecision, float] = {
    "fp16": torch.finfo(torch.float16).max,
    "bf16": torch.finfo(torch.bfloat16).max,
    "int8": torch.finfo(torch.float16).max,  # what is not in INT8
}
SHOWN = 3


@dataclass(frozen=True)
class Rounding:
    """The in-mask error of a reduced precision on a head with a calcification.

    Attributes
    ----------
    precision
        What was rounded to.
    shape
        Of the head.
    p999_ppb, max_ppb
        The 99.9th percentile and the largest of the error's magnitude, NaN if one is.
    activations
        For each operator in that precision, the largest magnitude that it returns, as a share of
        the largest number that the precision knows.
    """

    precision: GraphPrecision
    shape: tuple[int, int, int]
    p999_ppb: float
    max_ppb: float
    activations: Mapping[str, float]

    @property
    def fullest(self) -> tuple[str, float]:
        """The operator that comes nearest to an overflow, and its share; NaN is nearest."""
        return max(
            self.activations.items(), key=lambda item: np.inf if np.isnan(item[1]) else item[1]
        )


def rounded_session(run: RoundedRun, card: ModelCard) -> GraphSession:
    """Return a graph with true rounding as an inference backend."""
    return GraphSession(run, card, "rounded", torch.__version__)


def measure_rounding(model: onnx.ModelProto, module: Network, card: ModelCard) -> Rounding:
    """Reconstruct a head with a graph, every operator's output rounded, and with its module.

    Parameters
    ----------
    model
        In the card's precision, of standard operators only.
    module
        What it was made from, in evaluation mode.
    card
        Of the graph.
    """
    scan = calcified_scan(card)
    plan = plan_for(card, SHAPE)
    rounded = RoundedRun(model)
    made = prior_maps(card.priors, scan)
    exact = network_outputs(ModuleSession(module, card), scan, plan, made=made)
    got = network_outputs(rounded_session(rounded, card), scan, plan, made=made)
    error = distribution_ppb(difference_ppb(got, exact, scan.mask))
    limit = LIMITS[card.precision]
    activations = {name: value / limit for name, value in rounded.largest.items()}
    return Rounding(card.precision, SHAPE, error["p999_ppb"], error["max_ppb"], activations)


def calcified_scan(card: ModelCard) -> Scan:
    """Return the part of a head around its calcification, as a network needs it."""
    return phantom_scan(card, HEAD).cut(box_at(CORNER, SHAPE))


def require_accuracy(rounding: Rounding, gate_ppb: float) -> None:
    """Refuse a precision that a network does not tolerate.

    Parameters
    ----------
    rounding
        As measured.
    gate_ppb
        What no voxel may exceed, and 99.9 % of them only a tenth of [ppb].

    Raises
    ------
    AccuracyError
        If they do, or an activation does not fit the precision.
    """
    name, share = rounding.fullest
    if not share < 1:
        raise AccuracyError(
            f"{name} overflows {rounding.precision}: it returns {share:.3g} times the largest "
            "number; nothing was written: export the network in fp32"
        )
    typical = rounding_budget(gate_ppb)["p999_ppb"]
    if not (rounding.p999_ppb <= typical and rounding.max_ppb <= gate_ppb):
        raise AccuracyError(
            f"rounding to {rounding.precision} costs {_errors(rounding)} in the mask, the gate is "
            f"p99.9 {typical:g} ppb and max {gate_ppb:g} ppb; nothing was written: export the "
            "network in fp32, or accept the error with --gate-ppb"
        )


def verification_from(
    differences: list[Difference], rounding: Rounding | None, gate_ppb: float
) -> Verification:
    """Return what the card says about the backends and, where there is one, the rounding.

    Raises
    ------
    AccuracyError
        If a backend is above the gate.
    """
    if rounding is None:
        return apply_gate(differences, gate_ppb)
    reference = (
        f"pytorch in fp32, against every operator's output rounded to {rounding.precision} in "
        f"pytorch on {shape_text(rounding.shape)}: {_errors(rounding)}, activations up to "
        f"{rounding.fullest[1]:.2g} of the largest number"
    )
    if not differences:
        return Verification(reference, rounding.max_ppb, (rounding.shape,))
    run = apply_gate(differences, gate_ppb)
    backends = run.reference.removeprefix("pytorch, against ")
    return Verification(
        f"{reference}; {run.max_ppb:.2g} ppb in {backends}, which round less",
        max(run.max_ppb, rounding.max_ppb),
        (*run.shapes, rounding.shape),
    )


def rounding_lines(rounding: Rounding) -> list[str]:
    """Return what was measured as people read it, the operators nearest to an overflow named."""
    nearest = sorted(rounding.activations.items(), key=lambda item: -item[1])[:SHOWN]
    return [
        f"every operator's output rounded to {rounding.precision}: {_errors(rounding)}",
        f"activations by the largest {rounding.precision}: "
        + ", ".join(f"{share:.2g} after {name}" for name, share in nearest),
    ]


def _errors(rounding: Rounding) -> str:
    return f"p99.9 {rounding.p999_ppb:.2g} ppb, max {rounding.max_ppb:.2g} ppb"
