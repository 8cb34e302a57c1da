"""The Python interface for a host whose volumes are on the GPU already.

    engine = open_engine("ir2qsm-fp16.plan")
    chi = engine.reconstruct(field, mask, voxel_size_mm=(1, 1, 1), b0_direction=(0, 0, 1))
    chi = torch.from_dlpack(chi)  # or cupy.from_dlpack(chi), cupy.asarray(chi)

Arrays on the GPU are taken where they lie, and the map stays there; the host has a copy of the
field where its noise counts. But volumes whose axes are not the canonical ones
(:mod:`qsm_deploy.runtime.scan.axes`), or whose grid is not the training's, take the way over the
host. Run on an H100 with arrays of PyTorch and CuPy, PyTorch being the engine.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import (
    DeviceView,
    DeviceVolume,
    is_on_device,
    view,
)
from qsm_deploy.runtime.gpu.device import Device
from qsm_deploy.runtime.gpu.layout import FIELD
from qsm_deploy.runtime.gpu.network import GpuNetwork
from qsm_deploy.runtime.gpu.reconstruction import on_device, reconstruct_to_device
from qsm_deploy.runtime.gpu.session import is_called_by_host
from qsm_deploy.runtime.methods.on_gpu import GpuVariation
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.planning import Decision
from qsm_deploy.runtime.reconstructor import Host, Reconstructor, open_reconstructor
from qsm_deploy.runtime.scan.arrays import affine_from, mask_from, vector
from qsm_deploy.runtime.scan.axes import STORED, axes_named, axes_of
from qsm_deploy.runtime.scan.geometry_limits import deviations
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.units import require_ppm
from qsm_deploy.runtime.scan.wraps import require_unwrapped

MASK_KINDS = ("b1", "u1")


class Engine:
    """A network or a method on a GPU. All calls must come from the thread that opened it."""

    def __init__(self, reconstructor: Reconstructor) -> None:
        inversion = reconstructor.inversion
        if not isinstance(inversion, GpuNetwork | GpuVariation):
            raise UsageError(f"{inversion.name} is not on a GPU: open it with device='cuda:0'")
        if reconstructor.before is not None:
            raise UsageError("arrays on a GPU are for one model or method; pass them on the host")
        if isinstance(inversion, GpuNetwork):
            _require_field_alone(inversion.card)
        self._inversion, self._reconstructor = inversion, reconstructor
        self.last_decision: Decision | None = None
        self.findings: dict[str, Any] = {}

    def reconstruct(
        self,
        local_field_ppm: Any,
        mask: Any,
        *,
        voxel_size_mm: Sequence[float],
        b0_direction: Sequence[float],
        axes: str | ArrayLike | None = None,
        wants: Wants | None = None,
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
        axes
            Where x, y and z run to: letters such as ``LPS``, or an affine to RAS [mm]. ``None`` is
            not known: then nothing is flipped, and the axis nearest to B0 becomes the third.
        wants
            What is asked for; by default the whole volume if it fits, on the grid of the training.
            ``findings`` says what a data-consistency step did.

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
            If the geometry is invalid.
        MemoryLimitError
            If it does not fit the GPU, not even in patches.
        EngineError
            If the engine fails, or the map is not finite.
        """
        inversion = self._inversion
        device = inversion.place.device
        inside = _mask(mask, device)
        x, y, z = inside.shape
        grid = Geometry((x, y, z), vector(voxel_size_mm), vector(b0_direction))
        wants, needs = wants or Wants(), self._reconstructor.needs
        affine = affine_from(axes, grid.voxel_size_mm)
        stays = {axes_of(affine, grid), axes_named(needs.axes)} == {STORED}
        stays &= wants.allow_geometry or not deviations(needs.geometry, grid)
        is_judged = not stays or inversion.judges_field
        field, measured = _field(local_field_ppm, inside, device, is_judged=is_judged)
        scan = Scan(measured[None], inside, grid, nib.Nifti1Header(), affine).canonical()
        planned = self._reconstructor.plan(scan, wants)
        self.last_decision = planned.task.decision
        if stays:
            job, told = inversion.job(planned.task, field)
            chi, found = reconstruct_to_device(job, Stages())
            self.findings = told | found
            return chi
        for note in planned.notes:
            warnings.warn(note, stacklevel=2)
        made = self._reconstructor.run(planned, Stages())
        self.findings = made.findings.pop("inversion", {}) | made.findings
        return on_device(scan.axes.turn_back(made.map_ppm), device)


def open_engine(path: Path | str, device: int = 0) -> Engine:
    """Load a plan, or an ONNX file for ONNX Runtime on CUDA, on a GPU.

    Raises
    ------
    UsageError
        If its network needs more than one local field and its mask.
    EngineError
        If there is no GPU of that number, or the model cannot run there.
    MissingDependencyError
        If a library is not installed.
    """
    return Engine(open_reconstructor([Path(path)], Host(device=f"cuda:{device}")))


def _mask(mask: Any, device: Device) -> NDArray[np.bool_]:
    """Return a mask on the host."""
    if is_on_device(mask):
        there = view("mask", mask, device.number)
        if there.kind not in MASK_KINDS:
            raise DataError(f"the mask has type {there.kind}, expected bool or uint8")
        mask = _copied(there, np.uint8, device)
    return mask_from(mask)[0]


def _field(
    field: Any, mask: NDArray[np.bool_], device: Device, *, is_judged: bool
) -> tuple[DeviceView | None, NDArray[np.float32]]:
    """Return the field where it lies on the GPU, and what stands for it on the host.

    That is a copy if its noise is to be judged, or it is to have other axes or another grid, else
    nothing.
    """
    there = view("local_field_ppm", field, device.number) if is_on_device(field) else None
    values = field
    if there is not None:
        _require_same_grid(there.shape, there.kind, mask)
        if not is_judged:
            return there, np.broadcast_to(np.float32(0), mask.shape)
        values = _copied(there, np.float32, device)
    values = np.asarray(values)
    _require_same_grid(values.shape, values.dtype.str.lstrip("<|="), mask)
    within = values[mask]
    if not np.isfinite(within).all():
        raise DataError("the field holds NaN or Inf inside the mask; fix it or the mask")
    require_unwrapped(values, mask, turn=None)
    require_ppm(within, "ppm")
    return there, np.where(mask, values, np.float32(0))


def _copied(there: DeviceView, dtype: DTypeLike, device: Device) -> NDArray[Any]:
    """Return what lies on the GPU, once its owner's work is done."""
    values = device.pinned(there.shape, dtype)
    device.copy_out(values, there.pointer, there.stream)
    device.synchronize()
    return values


def _require_field_alone(card: ModelCard) -> None:
    """Refuse a network that takes more than a field and its mask, or that the host calls."""
    taken = {tensor.name for tensor in card.inputs if tensor.is_volume}
    made = {prior.name for prior in card.priors}
    if taken - made - {FIELD, "mask"} or is_called_by_host(card):
        raise UsageError(
            f"{card.network} takes other than a local field and its mask, or steps between its "
            "runs; use qsm-run, or export it in one graph (--form unrolled)"
        )


def _require_same_grid(shape: tuple[int, ...], kind: str, mask: NDArray[np.bool_]) -> None:
    if shape != mask.shape:
        raise DataError(f"local_field_ppm has shape {shape}, the mask {mask.shape}")
    if kind != "f4":
        raise DataError(f"local_field_ppm has type {kind}, expected float32")
