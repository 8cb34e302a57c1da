"""Every export checks itself: the ONNX file in each backend against the PyTorch module."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom.measured_head import STAND_IN_THRESHOLD, scan_from_phantom
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.networks.network import Network, outputs_of
from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.kernels.errors import AccuracyError
from qsm_deploy.kernels.geometry import Geometry, Volume, shape_text
from qsm_deploy.runtime.card.card import ModelCard, Verification
from qsm_deploy.runtime.metrics.difference import difference_ppb
from qsm_deploy.runtime.reconstruction.pipeline import network_inputs, network_outputs
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps
from qsm_deploy.runtime.reconstruction.tiles import plan_for
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Backend, Precision

# a cube, an odd size that is padded to the divisor, and three different axes
SHAPES = ((48, 48, 48), (51, 45, 37), (64, 32, 40))
SEED = 7


@dataclass(frozen=True)
class Difference:
    """The largest in-mask difference of one backend on one shape [ppb]."""

    backend: Backend
    shape: tuple[int, int, int]
    max_ppb: float


class ModuleSession:
    """A PyTorch module behind the protocol of an inference backend: eager, FP32."""

    precision: Precision = "fp32"
    backend = "pytorch"
    version: str = torch.__version__

    def __init__(self, module: Network, card: ModelCard) -> None:
        self.module = module
        self.card = card

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the module once; see :class:`qsm_deploy.runtime.sessions.session.Session`."""
        given = [torch.from_numpy(tensors[tensor.name]) for tensor in self.card.inputs]
        with torch.inference_mode():
            joined = torch.cat(outputs_of(self.module, given), dim=1)
        output: NDArray[np.float32] = joined.numpy()
        return output


def measure_differences(
    path: Path, module: Network, card: ModelCard, backends: tuple[Backend, ...]
) -> list[Difference]:
    """Reconstruct phantoms with an exported model and with its module, as the runtime does.

    Parameters
    ----------
    path
        The ONNX file.
    module
        What it was made from, in evaluation mode.
    card
        The file's.
    backends
        Those that are installed.

    Returns
    -------
    list
        One difference for each backend and shape; NaN if either side is NaN in the mask.
    """
    sessions = {backend: open_session(path, backend) for backend in backends}
    reference = ModuleSession(module, card)
    differences = []
    for shape in SHAPES:
        scan = phantom_scan(card, shape)
        plan = plan_for(card, shape)
        made = prior_maps(card.priors, scan)
        expected = network_outputs(reference, scan, plan, made=made)
        for backend, session in sessions.items():
            got = network_outputs(session, scan, plan, made=made)
            error = difference_ppb(got, expected, scan.mask)
            differences.append(Difference(backend, shape, float(np.abs(error).max())))
    return differences


def apply_gate(differences: list[Difference], gate_ppb: float) -> Verification:
    """Return what the card says about the differences.

    Raises
    ------
    AccuracyError
        If one is above the gate or not a number.
    """
    worst = max(differences, key=lambda d: np.inf if np.isnan(d.max_ppb) else d.max_ppb)
    if not worst.max_ppb <= gate_ppb:
        raise AccuracyError(
            f"the exported model differs from PyTorch by {worst.max_ppb:.3g} ppb "
            f"({worst.backend}, {shape_text(worst.shape)}), the gate is {gate_ppb:g} ppb; nothing "
            "was written: accept the error with --gate-ppb if it is that of rounding"
        )
    shapes = tuple(dict.fromkeys(d.shape for d in differences))
    backends = " and ".join(dict.fromkeys(d.backend for d in differences))
    return Verification(f"pytorch, against {backends}", worst.max_ppb, shapes)


def phantom_scan(card: ModelCard, shape: tuple[int, int, int]) -> Scan:
    """Return a head phantom as a scanner would measure it for a network.

    Always the same head for a shape, on an axial grid of 1 mm.
    """
    return scan_from_phantom(card, head_phantom(Geometry(shape), seed=SEED))


def phantom_inputs(card: ModelCard, scan: Scan) -> dict[str, Volume]:
    """Return what a graph takes of a phantom, by name and in order.

    A TKD map of unit spread stands in for the input of a prior, which the runtime has only in the
    course of a reconstruction.
    """
    first = card.inputs[0]
    if first.name != "prior_input":
        return network_inputs(card, scan)
    chi = scan.mask * tkd(scan.measured[0], scan.geometry, threshold=STAND_IN_THRESHOLD)
    chi /= chi[scan.mask].std()
    return {first.name: np.stack([chi] * int(first.shape[1]))}
