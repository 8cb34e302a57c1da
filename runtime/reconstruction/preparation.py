"""From a scan as it was measured to one as an inversion takes it, and from its map back.

A network that was trained at one voxel size and one direction of B0 gets both: Fourier
interpolation along each axis to the size, then one cubic turn. Background removal and unwrapping
come before, on the native grid, where they are as good at any tilt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Geometry, Volume, vector_text
from qsm_deploy.runtime.card.card import GeometryLimits
from qsm_deploy.runtime.reconstruction.inversion import Needs, Wants
from qsm_deploy.runtime.scan.axes import axes_named
from qsm_deploy.runtime.scan.geometry_limits import deviations, has_other_voxels, tilt_deg
from qsm_deploy.runtime.scan.scan import Scan

THICK_MM = 2.0  # no voxels above were measured
OTHERWISE = "use a network for any geometry such as tv-unet, or pass --allow-geometry"
OF_HEAD = f"a field of the whole head is neither resampled nor turned: {OTHERWISE}"
OF_PHASE = (
    "a wrapped phase is not turned, since what interpolates across its wraps makes artefacts: make "
    f"a local field of it first, {OTHERWISE}"
)


@dataclass(frozen=True)
class Prepared:
    """A scan as the map is for it, and as an inversion takes it.

    Attributes
    ----------
    measured
        As the map is for it.
    scan
        As an inversion takes it; the same one where its grid does for that.
    departures
        How its grid departs from the training.
    back
        What brings a map from its grid to the measured one, step by step.
    facts
        What was done to it, for the report.
    """

    measured: Scan
    scan: Scan
    departures: tuple[str, ...] = ()
    back: tuple[Callable[[Volume], Volume], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def brought_back(self, chi_ppm: Volume) -> Volume:
        """Return a map of the inversion's grid on the measured one, 0 outside the mask."""
        for step in self.back:
            chi_ppm = step(chi_ppm)
        return chi_ppm * self.measured.mask


def prepare(needs: Needs, measured: Scan, wants: Wants) -> Prepared:
    """Erode the mask, give the network the grid of its training, and judge what is left.

    Raises
    ------
    DataError
        If nothing of the mask is left.
    GeometryError
        If the network was not trained for the grid, it cannot be brought to another, and that is
        not allowed.
    """
    if needs.mask_erosion_voxels:
        from qsm_deploy.runtime.scan.erosion import erode_mask

        measured = erode_mask(measured, needs.mask_erosion_voxels)
    axes = axes_named(needs.axes)
    turned = measured.turned(axes)
    prepared = Prepared(measured, turned)
    if turned is not measured:
        prepared = replace(prepared, back=(axes.turn_back,))
    if not wants.allow_geometry:
        prepared = _on_trained_grid(needs, prepared)
    found = deviations(needs.geometry, prepared.scan.geometry)
    if found and not wants.allow_geometry:
        way = OF_PHASE if measured.quantity == "phase_rad" else OTHERWISE
        way = OF_HEAD if needs.unmasked else way
        raise GeometryError(f"{'; '.join(deviations(needs.geometry, turned.geometry))}; {way}")
    return replace(prepared, departures=tuple(found))


def _on_trained_grid(needs: Needs, prepared: Prepared) -> Prepared:
    """Resample what has other voxels than the training, and turn what is tilted against it."""
    limits, native = needs.geometry, prepared.scan
    scan, back = native, prepared.back
    facts: dict[str, Any] = {}
    if needs.unmasked:  # what lies around the mask's box would be lost
        return prepared
    resamples = has_other_voxels(limits, native.geometry)
    if resamples:
        from qsm_deploy.runtime.scan.resampling import resample_map, resample_scan

        assert limits.voxel_size_mm is not None
        scan = resample_scan(scan, limits.voxel_size_mm)
        back = (partial(resample_map, mask=native.mask), *back)
        facts["resampled"] = "Fourier, axis by axis"
    angle = tilt_deg(limits, scan.geometry)
    turns = angle > 0 and scan.quantity != "phase_rad" and len(scan.measured) == 1
    if turns:
        from qsm_deploy.runtime.scan.turned_grid import grid_along

        assert limits.b0_direction is not None
        edges = _edges(limits, scan.geometry, resampled=resamples)
        grid = grid_along(scan.geometry, scan.mask, limits.b0_direction, edges)
        back = (partial(grid.turn_back, shape=scan.mask.shape), *back)
        scan = grid.scan_with(scan, grid.turn(scan.measured[0])[None])
        facts |= {"turned_deg": round(angle, 3), "turned": "cubic B-splines"}
    if not facts:
        return prepared
    said = [f"turned by {angle:.1f} degrees"] * turns
    said += [f"resampled to {_size(scan.geometry)}"] * resamples
    how = f"{' and '.join(said)} for {needs.network}, and the map back; B0 from {native.b0_from}"
    notes = [*native.notes, how]
    if resamples and (thick := max(native.geometry.voxel_size_mm)) > 1.001 * THICK_MM:
        notes.append(
            f"slices of {thick:.3g} mm are interpolated: what that costs was measured up to "
            f"{THICK_MM:g} mm"
        )
    return replace(prepared, scan=replace(scan, notes=notes), back=back, facts=facts)


def _edges(
    limits: GeometryLimits, geometry: Geometry, *, resampled: bool
) -> tuple[float, float, float]:
    """Return the voxel size of a turned grid: the training's, or the mean of its own.

    What is 1.06 mm for a network that tolerates it is not interpolated to 1.
    """
    if resampled and limits.voxel_size_mm is not None:
        return limits.voxel_size_mm
    mean = math.prod(geometry.voxel_size_mm) ** (1 / 3)
    return mean, mean, mean


def _size(geometry: Geometry) -> str:
    sizes = geometry.voxel_size_mm
    return f"{vector_text(sizes)} mm" if np.ptp(sizes) > 1e-3 * sizes[0] else f"{sizes[0]:.4g} mm"
