"""Every export checks itself: the ONNX file in each backend against the PyTorch module."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom import head_phantom
from qsm_deploy.export.networks.network import Network
from qsm_deploy.export.registry import NetworkSpec
from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.kernels.errors import AccuracyError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card import Verification
from qsm_deploy.runtime.patches import Volume, plan_whole
from qsm_deploy.runtime.pipeline import run_patch
from qsm_deploy.runtime.session import Backend, Session, open_session

# a cube, an odd size that is padded to the divisor, and three different axes
SHAPES = ((48, 48, 48), (51, 45, 37), (64, 32, 40))
SEED = 7
PPB = 1000.0


@dataclass(frozen=True)
class Difference:
    """The largest in-mask difference of one backend on one shape [ppb]."""

    backend: Backend
    shape: tuple[int, int, int]
    max_ppb: float


def measure_differences(
    path: Path, module: Network, spec: NetworkSpec, backends: tuple[Backend, ...]
) -> list[Difference]:
    """Run an exported model and its module on phantoms, padded as the runtime pads.

    Parameters
    ----------
    path
        The ONNX file.
    module
        What it was made from, in evaluation mode.
    spec
        The network.
    backends
        Those that are installed.

    Returns
    -------
    list
        One difference for each backend and shape; NaN if either side is NaN in the mask.
    """
    sessions = {backend: open_session(path, backend) for backend in backends}
    differences = []
    for shape, inputs, mask in phantom_inputs(spec):
        plan = plan_whole(shape, module.divisor)
        expected = plan.run(lambda volumes: run_module(module, volumes), inputs, mask)
        for backend, session in sessions.items():
            infer = partial(_run_session, session, spec)
            got = plan.run(infer, inputs, mask)
            error = np.abs(got[mask].astype(np.float64) - expected[mask])
            differences.append(Difference(backend, shape, float(error.max()) * PPB))
    return differences


def _run_session(session: Session, spec: NetworkSpec, volumes: list[Volume]) -> Volume:
    return run_patch(session, dict(zip(spec.inputs, volumes, strict=True)))


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


def phantom_inputs(
    spec: NetworkSpec,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
) -> Iterator[tuple[tuple[int, int, int], list[Volume], NDArray[np.bool_]]]:
    """Yield (shape, inputs, mask) of a head phantom for each shape, the inputs as the card says."""
    for shape in shapes:
        geometry = Geometry(shape)
        head = head_phantom(geometry, seed=SEED)
        inputs = [head.local_field_ppm]
        if spec.tkd is not None:
            inverse = tkd(
                head.local_field_ppm,
                geometry,
                threshold=spec.tkd.threshold,
                pad_voxels=spec.tkd.pad_voxels,
            )
            inputs.append(inverse * head.mask if spec.tkd.masked else inverse)
        yield shape, inputs, head.mask


def run_module(module: Network, volumes: list[Volume]) -> Volume:
    """Return the module's (x, y, z) output for (x, y, z) inputs, eager and in FP32."""
    with torch.inference_mode():
        chi = module(*(torch.from_numpy(v)[None, None] for v in volumes))
    output: Volume = chi[0, 0].numpy()
    return output
