"""Every export checks itself: the ONNX file in each backend against the PyTorch module."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom import Phantom, head_phantom
from qsm_deploy.export.networks.network import Network
from qsm_deploy.kernels.dipole import dipole_convolve, tkd
from qsm_deploy.kernels.errors import AccuracyError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card import ModelCard, Verification
from qsm_deploy.runtime.patches import plan_whole
from qsm_deploy.runtime.pipeline import Volume, network_inputs, network_output
from qsm_deploy.runtime.scan import Scan
from qsm_deploy.runtime.session import Backend, Precision, open_session
from qsm_deploy.runtime.units import ppm_per_unit

# a cube, an odd size that is padded to the divisor, and three different axes
SHAPES = ((48, 48, 48), (51, 45, 37), (64, 32, 40))
SEED = 7
PPB = 1000.0
STAND_IN_THRESHOLD = 0.2


@dataclass(frozen=True)
class Difference:
    """The largest in-mask difference of one backend on one shape [ppb]."""

    backend: Backend
    shape: tuple[int, int, int]
    max_ppb: float


class ModuleSession:
    """A PyTorch module behind the protocol of an inference backend: eager, FP32."""

    precision: Precision = "fp32"
    version: str = torch.__version__

    def __init__(self, module: Network, card: ModelCard) -> None:
        self.module = module
        self.card = card
        self.backend: Backend = "onnxruntime"

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the module once; see :class:`qsm_deploy.runtime.session.Session`."""
        given = [torch.from_numpy(tensors[tensor.name]) for tensor in self.card.inputs]
        with torch.inference_mode():
            output: NDArray[np.float32] = self.module(*given).numpy()
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
        plan = plan_whole(shape, module.divisor)
        expected = network_output(reference, scan, plan)[scan.mask]
        for backend, session in sessions.items():
            error = network_output(session, scan, plan)[scan.mask].astype(np.float64) - expected
            differences.append(Difference(backend, shape, float(np.abs(error).max()) * PPB))
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
        shape = "x".join(map(str, worst.shape))
        raise AccuracyError(
            f"the exported model differs from PyTorch by {worst.max_ppb:.3g} ppb "
            f"({worst.backend}, {shape}), the gate is {gate_ppb:g} ppb; nothing was written"
        )
    shapes = tuple(dict.fromkeys(d.shape for d in differences))
    backends = " and ".join(dict.fromkeys(d.backend for d in differences))
    return Verification(f"pytorch, against {backends}", worst.max_ppb, shapes)


def phantom_scan(card: ModelCard, shape: tuple[int, int, int]) -> Scan:
    """Return a head phantom as a scanner would measure it for a network.

    Always the same head for a shape, on an axial grid of 1 mm.
    """
    return scan_from_phantom(card, head_phantom(Geometry(shape), seed=SEED))


def scan_from_phantom(card: ModelCard, head: Phantom) -> Scan:
    """Return a head as a scanner would measure it for a network.

    Where another network's map is refined, a TKD map stands in for it. Orientations after the
    first are tilted by 25 degrees each from the third axis; a phase is that of 20 ms at 3 T,
    wrapped.
    """
    directions = [
        (0.0, math.sin(math.radians(25 * n)), math.cos(math.radians(25 * n)))
        for n in range(card.field_counts.start)
    ]
    fields = [head.local_field_ppm] + [
        head.mask * dipole_convolve(head.chi_ppm, replace(head.geometry, b0_direction=direction))
        for direction in directions[1:]
    ]
    measured = np.stack(fields)
    is_phase = card.task == "phase->chi"
    if is_phase:
        radians = measured / ppm_per_unit("rad", echo_time_s=0.02, field_strength_t=3.0)
        measured = np.angle(np.exp(1j * radians)).astype(np.float32)
    if card.inputs[0].name == "rough_chi_ppm":
        measured = (head.mask * tkd(fields[0], head.geometry, threshold=STAND_IN_THRESHOLD))[None]
    return Scan(
        measured,
        head.mask,
        head.geometry,
        nib.Nifti1Header(),
        np.eye(4),
        quantity="phase_rad" if is_phase else "local_field_ppm",
        more_b0_directions=tuple(directions[1:]),
        echo_time_s=0.02,
        field_strength_t=3.0,
    )


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
