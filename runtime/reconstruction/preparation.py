"""From a scan as it was measured to one as an inversion takes it, or a refusal."""

from dataclasses import dataclass

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.reconstruction.inversion import Needs, Wants
from qsm_deploy.runtime.scan.geometry_limits import deviations, require_geometry
from qsm_deploy.runtime.scan.scan import Scan


@dataclass(frozen=True)
class Prepared:
    """A scan as the map is for it, as an inversion takes it, and how it departs from the training.

    Both are one object where nothing was resampled.
    """

    measured: Scan
    scan: Scan
    departures: tuple[str, ...] = ()


def prepare(needs: Needs, measured: Scan, wants: Wants) -> Prepared:
    """Erode the mask and resample, as is needed and wanted, and judge the geometry.

    Raises
    ------
    UsageError
        If it is to be resampled for a network that takes any voxel size.
    DataError
        If nothing of the mask is left.
    GeometryError
        If the network was not trained for the grid, and that is not allowed.
    """
    if needs.mask_erosion_voxels:
        from qsm_deploy.runtime.scan.erosion import erode_mask

        measured = erode_mask(measured, needs.mask_erosion_voxels)
    scan = measured
    if wants.resample:
        if needs.geometry.voxel_size_mm is None:
            raise UsageError(f"{needs.network} takes any voxel size; drop --resample")
        from qsm_deploy.runtime.scan.resampling import resample_scan

        scan = resample_scan(measured, needs.geometry.voxel_size_mm)
    if not wants.allow_geometry:
        require_geometry(needs.geometry, scan.geometry)
    return Prepared(measured, scan, tuple(deviations(needs.geometry, scan.geometry)))
