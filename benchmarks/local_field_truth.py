"""Heads whose local field is known, and how near a field or a mask comes to theirs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
from common import Row
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.contrast import draw_contrast
from qsm_deploy.calibration.phantom.gradient_echo import GradientEcho, acquire
from qsm_deploy.calibration.phantom.labelled_head import Measured, fine_head, measure
from qsm_deploy.calibration.phantom.phantom import dipole_field, head_phantom
from qsm_deploy.calibration.phantom.surroundings import background_field, draw_surroundings
from qsm_deploy.kernels.geometry import Geometry, Mask, Shape, Volume
from qsm_deploy.runtime.local_field.field_mapping import FieldMap
from qsm_deploy.runtime.local_field.unwrapping import TURN
from qsm_deploy.runtime.scan.agreement import linear_fit, nrmse_percent

HEAD_SEED, NOISE_SEED = 3, 4
TIMES_S = (0.004, 0.010, 0.016, 0.022, 0.028)
SHORT_TIMES_S = (0.0065, 0.0135, 0.0205)
PROTOCOLS: dict[str, tuple[Shape, tuple[float, float, float], GradientEcho]] = {
    "A": ((164, 205, 205), (0.0, 0.0, 1.0), GradientEcho(TIMES_S)),
    "C": ((205, 256, 102), (0.1, 0.5, 1.0), GradientEcho(SHORT_TIMES_S, snr=30.0, bipolar=True)),
}
PHANTOM, PHANTOM_SEED = Geometry((114, 137, 114), (1.4, 1.4, 1.4), (0.2, 0.1, 1.0)), 1
DEFINED_PPM, DEFINED_LOCAL_PPM = 5.0, 0.5  # beyond, next to no signal tells the truth
DEEP_MM, DEEPER_MM = 3.0, 6.0
FAR_OFF_PPM = 0.02
WORST_PERCENT = (1, 2, 5, 10)
FAR_OUTSIDE_MM = 2.0
MAD = 0.6745  # of a normal distribution, over its standard deviation


@dataclass(frozen=True)
class Head:
    """A measured head, and the voxels in which its truth is compared."""

    measured: Measured
    sequence: GradientEcho

    @cached_property
    def defined(self) -> Mask:
        """Where there is signal enough to tell the truth."""
        total, local = np.abs(self.measured.total_ppm), np.abs(self.measured.local_ppm)
        defined: Mask = self.measured.mask & (total < DEFINED_PPM) & (local < DEFINED_LOCAL_PPM)
        return defined

    @cached_property
    def depth_mm(self) -> Volume:
        """Below the surface of the brain."""
        voxel = self.measured.echoes.geometry.voxel_size_mm
        return distance_transform_edt(self.measured.mask, sampling=voxel).astype(np.float32)

    def deeper(self, than_mm: float, mask: Mask | None = None) -> Mask:
        """Return the voxels of a mask, or of the brain, that lie deeper."""
        inside = self.measured.mask if mask is None else mask
        deeper: Mask = inside & self.defined & (self.depth_mm > than_mm)
        return deeper


def labelled_head(path: Path, protocol: str) -> Head:
    """Return the head of a segmentation as a protocol measures it."""
    shape, direction, sequence = PROTOCOLS[protocol]
    image = nib.load(path)
    labels = np.asarray(image.dataobj).astype(np.uint8)
    x, y, z = map(float, image.header.get_zooms()[:3])
    fine = fine_head(labels, Geometry(labels.shape, (x, y, z), direction), seed=HEAD_SEED)
    measured = measure(fine, shape, sequence, np.random.default_rng(NOISE_SEED))
    return Head(measured, sequence)


def procedural_head() -> Head:
    """Return the head of ``qsm-phantom``, which has no bone at its brain, measured as in A."""
    head, sequence = head_phantom(PHANTOM, seed=PHANTOM_SEED, noise_ppm=0.0), GradientEcho(TIMES_S)
    around = draw_surroundings(head.mask, PHANTOM)
    chi = np.where(head.mask, head.chi_ppm - head.chi_ppm[head.mask].mean(), np.float32(0))
    local = dipole_field(chi, PHANTOM) * head.mask
    total = dipole_field(head.chi_ppm, PHANTOM) + background_field(around, PHANTOM)
    rng = np.random.default_rng(NOISE_SEED)
    contrast = draw_contrast(np.where(head.mask, head.labels, around), PHANTOM, rng)
    echoes = acquire(sequence, contrast, total, head.mask, PHANTOM, rng)
    return Head(Measured(echoes, total * head.mask, local, chi, head.mask, head.labels), sequence)


def nrmse_row(head: Head, found: Volume, truth: Volume, mask: Mask) -> Row:
    """Return the error of a map in a mask, and in what of it is deep [%]."""
    parts = {"all": 0.0, "d3": DEEP_MM, "d6": DEEPER_MM}
    inside = {name: head.deeper(mm, mask) for name, mm in parts.items()}
    return {f"nrmse_{n}": round(nrmse_percent(found[w], truth[w]), 1) for n, w in inside.items()}


def local_field_row(head: Head, local_ppm: Volume, mask: Mask) -> Row:
    """Return how near a local field is to the truth, and how much of the brain it covers."""
    truth, brain, deep = head.measured.local_ppm, head.measured.mask, head.deeper(DEEP_MM, mask)
    slope, _ = linear_fit(truth[deep], local_ppm[deep])
    kept = {"slope_d3": round(slope, 3), "kept_percent": round(percent(mask[brain]), 1)}
    return nrmse_row(head, local_ppm, truth, mask) | kept


def field_row(head: Head, found: FieldMap) -> Row:
    """Return the error of a mapped field by region, and how well noise and misfit tell it."""
    error = found.field_ppm - head.measured.total_ppm
    size = np.abs(error - np.median(error[head.deeper(DEEP_MM)]))
    deep = head.deeper(DEEPER_MM)
    regions = {
        "brain": head.defined,
        "d6": deep,
        "rim": head.defined & (head.depth_mm <= DEEP_MM),
        "veins": head.defined & (head.measured.labels == Label.VEIN),
    }
    row: Row = {}
    for name, where in regions.items():
        for share, ppm in zip((50, 95, 99), np.percentile(size[where], (50, 95, 99)), strict=True):
            row[f"p{share}_ppb_{name}"] = round(1000 * float(ppm), 2)
    unwrapped = 2 if head.sequence.bipolar else 1
    turn = TURN / (head.sequence.rad_per_ppm(unwrapped) - head.sequence.rad_per_ppm(0))
    row["a_turn_off_percent"] = percent(size[head.defined] > turn / 2)
    return row | noise_row(head, found, size, deep)


def noise_row(head: Head, found: FieldMap, error_ppm: Volume, deep: Mask) -> Row:
    """Return how large errors are beside their noise, and how many of the largest are told."""
    noise, misfit = found.noise_ppm, found.misfit
    assert noise is not None
    assert misfit is not None
    far_off = (error_ppm > FAR_OFF_PPM) & head.defined
    over = float(np.median(error_ppm[deep] / noise[deep])) / MAD
    row = {
        "snr": head.sequence.snr,
        "snr_found": round(found.facts["snr"], 1),
        "noise_median_ppb": round(1000 * float(np.median(noise[head.defined])), 2),
        "error_over_noise_d6": round(over, 2),
        "far_off_percent": percent(far_off[head.defined]),
    }
    for name, told in {"noise": noise, "misfit": misfit}.items():
        for share in WORST_PERCENT:
            least = np.percentile(told[head.defined], 100 - share)
            row[f"far_off_in_worst_{share}_percent_by_{name}"] = percent(told[far_off] >= least)
    return row


def mask_row(head: Head, mask: Mask) -> Row:
    """Return how a mask and the brain overlap; shares are of the brain."""
    brain, voxel = head.measured.mask, head.measured.echoes.geometry.voxel_size_mm
    far = distance_transform_edt(~brain, sampling=voxel) > FAR_OUTSIDE_MM
    sizes = {"outside": mask & ~brain, "far_outside": mask & far, "missing": brain & ~mask}
    shares = {
        f"{n}_percent": round(100 * float(p.sum() / brain.sum()), 1) for n, p in sizes.items()
    }
    return {"dice": round(float(2 * (mask & brain).sum() / (mask.sum() + brain.sum())), 3)} | shares


def percent(where: NDArray[np.bool_]) -> float:
    """Return how much is true [%]."""
    return round(100 * float(np.mean(where)), 3)
