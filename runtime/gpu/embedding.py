"""The Python interface for a host whose volumes are on the GPU already.

    engine = open_engine("ir2qsm-fp16.plan")
    chi = engine.reconstruct(field, mask, voxel_size_mm=(1, 1, 1), b0_direction=(0, 0, 1))
    chi = torch.from_dlpack(chi)  # or cupy.from_dlpack(chi), cupy.asarray(chi)

Arrays on the GPU are taken where they lie, and the map stays there. Run on an H100 with arrays of
PyTorch and CuPy, PyTorch being the engine.
"""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import (
    DEFAULT_STREAM,
    DeviceView,
    DeviceVolume,
    is_on_device,
    view,
)
from qsm_deploy.runtime.gpu.device import Device
from qsm_deploy.runtime.gpu.layout import FIELD, DeviceWorkload
from qsm_deploy.runtime.gpu.open import open_gpu_sessions
from qsm_deploy.runtime.gpu.pipeline import TKD_INPUT, Gpu
from qsm_deploy.runtime.gpu.reconstruction import reconstruct_to_device
from qsm_deploy.runtime.gpu.session import is_called_by_host, limit_bytes
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.planning import Decision, PatchOptions, decide
from qsm_deploy.runtime.scan.geometry_limits import require_geometry
from qsm_deploy.runtime.scan.params import Vector
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.units import require_ppm

MASK_KINDS = ("b1", "u1")
WHOLE_OR_PATCHES = PatchOptions()


class Engine:
    """A network on a GPU. All calls must come from the thread that opened it."""

    def __init__(self, gpu: Gpu) -> None:
        card = gpu.session.card
        taken = {tensor.name for tensor in card.inputs if tensor.is_volume}
        if taken - {FIELD, TKD_INPUT} or is_called_by_host(card):
            raise UsageError(
                f"{card.network} takes more than a local field, or steps between its runs; use "
                "qsm-run, or export it in one graph (--form unrolled)"
            )
        self.card, self._gpu = card, gpu
        self.last_decision: Decision | None = None
        self.findings: dict[str, Any] = {}

    def reconstruct(
        self,
        local_field_ppm: Any,
        mask: Any,
        *,
        voxel_size_mm: Vector,
        b0_direction: Vector,
        correction: Correction | None = None,
        options: PatchOptions = WHOLE_OR_PATCHES,
        allow_geometry: bool = False,
    ) -> DeviceVolume:
        """Return the susceptibility map of one local field, on the GPU.

        Parameters
        ----------
        local_field_ppm
            (x, y, z) float32, contiguous with z fastest [ppm]; on the GPU or a numpy array. What
            lies outside the mask is not read.
        mask
            (x, y, z) bool or uint8, the same, nonzero inside. It is copied to the host, where the
            patches are planned.
        voxel_size_mm
            Along (x, y, z).
        b0_direction
            In voxel axes, of any non-zero norm.
        correction
            The data-consistency step, if there is to be one; ``findings`` says what it did.
        options
            How patches are to be; by default the whole volume if it fits.
        allow_geometry
            Whether to run although voxel size or B0 direction are not those of the training.

        Returns
        -------
        DeviceVolume
            (x, y, z) float32 susceptibility [ppm], 0 outside the mask, all work on it done.

        Raises
        ------
        DataError
            If an array has another shape or type, the mask is empty, or the field is not finite
            inside it.
        UnitsError
            If the field cannot be in ppm.
        GeometryError
            If the geometry is invalid, or not what the network was trained for.
        MemoryLimitError
            If it does not fit the GPU, not even in patches.
        EngineError
            If the engine fails, or the map is not finite.
        """
        device = self._gpu.device
        inside = _mask(mask, device)
        x, y, z = inside.shape
        grid = Geometry((x, y, z), voxel_size_mm, b0_direction)
        if not allow_geometry:
            require_geometry(self.card.geometry, grid)
        field, measured = _field(local_field_ppm, inside, device.number)
        scan = Scan(measured[None], inside, grid, nib.Nifti1Header(), np.eye(4))
        gpu = self._gpu
        work = DeviceWorkload(scan, gpu.session, gpu.library, correction, False, field)
        self.last_decision = decide(work, options, limit_bytes(gpu))
        chi, self.findings = reconstruct_to_device(gpu, work, self.last_decision.plan, Stages())
        return chi


def open_engine(path: Path | str, device: int = 0) -> Engine:
    """Load a plan, or an ONNX file for ONNX Runtime on CUDA, on a GPU.

    Raises
    ------
    UsageError
        If its network needs more than one local field.
    EngineError
        If there is no GPU of that number, or the model cannot run there.
    MissingDependencyError
        If a library is not installed.
    """
    (session,) = open_gpu_sessions([Path(path)], device)
    return Engine(session.gpu)


def _mask(mask: Any, device: Device) -> NDArray[np.bool_]:
    """Return a mask on the host."""
    if is_on_device(mask):
        there = view("mask", mask, device.number)
        if there.kind not in MASK_KINDS:
            raise DataError(f"the mask has type {there.kind}, expected bool or uint8")
        stream = DEFAULT_STREAM if there.stream is None else there.stream
        mask = device.pinned(there.shape, np.uint8)
        device.copy_out(mask, there.pointer, stream)
        device.synchronize()
    inside: NDArray[np.bool_] = np.asarray(mask) != 0
    if inside.ndim != 3:
        raise DataError(f"the mask has shape {inside.shape}, expected (x, y, z)")
    if not inside.any():
        raise DataError("the mask is empty; nothing to reconstruct")
    return inside


def _field(
    field: Any, mask: NDArray[np.bool_], device: int
) -> tuple[DeviceView | None, NDArray[np.float32]]:
    """Return the field where it lies on the GPU, and what stands for it on the host."""
    if is_on_device(field):
        there = view("local_field_ppm", field, device)
        _require_same_grid(there.shape, there.kind, mask)
        return there, np.broadcast_to(np.float32(0), mask.shape)
    values = np.asarray(field)
    _require_same_grid(values.shape, values.dtype.str.lstrip("<|="), mask)
    within = values[mask]
    if not np.isfinite(within).all():
        raise DataError("the field holds NaN or Inf inside the mask; fix it or the mask")
    require_ppm(within, "ppm")
    return None, np.where(mask, values, np.float32(0))


def _require_same_grid(shape: tuple[int, ...], kind: str, mask: NDArray[np.bool_]) -> None:
    if shape != mask.shape:
        raise DataError(f"local_field_ppm has shape {shape}, the mask {mask.shape}")
    if kind != "f4":
        raise DataError(f"local_field_ppm has type {kind}, expected float32")
