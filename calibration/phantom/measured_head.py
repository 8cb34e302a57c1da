"""A head phantom as a scanner would measure it for a network."""

import math

import nibabel as nib
import numpy as np

from qsm_deploy.calibration.phantom.phantom import Phantom
from qsm_deploy.kernels.dipole import dipole_convolve, tkd
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.units import ppm_per_unit

STAND_IN_THRESHOLD = 0.2
ECHO_TIME_S, FIELD_STRENGTH_T = 0.02, 3.0
TILT_DEG = 25.0
R2_PRIME_HZ_PER_PPM = np.float32(114)


def scan_from_phantom(card: ModelCard, head: Phantom) -> Scan:
    """Return what a network takes of a phantom, with the truth.

    Where another network's map is refined, a TKD map stands in for it. Orientations after the
    first are tilted by 25 degrees each about the first axis; a phase is that of 20 ms at 3 T,
    wrapped; R2' is that of sources of one sign in each voxel, with chi-sepnet's factor at 3 T.

    Parameters
    ----------
    card
        Of the network.
    head
        On any grid.
    """
    shape, voxel = head.geometry.shape, head.geometry.voxel_size_mm
    angles = [math.radians(TILT_DEG * n) for n in range(1, card.field_counts.start)]
    directions = [(0.0, math.sin(angle), math.cos(angle)) for angle in angles]
    fields = [head.local_field_ppm] + [
        head.mask * dipole_convolve(head.chi_ppm, Geometry(shape, voxel, direction))
        for direction in directions
    ]
    measured = np.stack(fields)
    takes = [tensor.name for tensor in card.inputs]
    is_phase = takes[0] == "phase_rad"
    if is_phase:
        parameters = {"echo_time_s": ECHO_TIME_S, "field_strength_t": FIELD_STRENGTH_T}
        radians = measured / ppm_per_unit("rad", **parameters)
        measured = np.angle(np.exp(1j * radians)).astype(np.float32)
    if takes[0] == "rough_chi_ppm":
        measured = (head.mask * tkd(fields[0], head.geometry, threshold=STAND_IN_THRESHOLD))[None]
    return Scan(
        measured,
        head.mask,
        head.geometry,
        nib.Nifti1Header(),
        np.eye(4),
        quantity="phase_rad" if is_phase else "local_field_ppm",
        more_b0_directions=tuple(directions),
        echo_time_s=ECHO_TIME_S,
        field_strength_t=FIELD_STRENGTH_T,
        truth_ppm=head.chi_ppm,
        chi_ppm=head.chi_ppm if "chi_ppm" in takes else None,
        r2prime_hz=R2_PRIME_HZ_PER_PPM * np.abs(head.chi_ppm) if "r2prime_hz" in takes else None,
    )
