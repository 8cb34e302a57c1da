"""From wrapped echoes to a local field, on a phantom and on a real scan."""

import math

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.echoes import Echoes
from qsm_deploy.runtime.local_field.from_echoes import (
    local_field_from_total,
    result_of,
    total_field_from_echoes,
)
from tests.runtime.local_field.acquisition import MEGAHERTZ_PER_TESLA, echoes_of


def total_of(echoes, mask):
    lines = total_field_from_echoes(echoes, mask, limit_bytes=1e10, stages=Stages())
    return result_of(lines)


@pytest.mark.parametrize("times", [(0.006,), (0.005, 0.011, 0.017)])
def test_slices_half_a_turn_off_make_no_difference(head, total, times):
    right, flipped = echoes_of(total, head.mask, times), echoes_of(total, head.mask, times)
    flipped.phase_rad[..., ::2] += math.pi
    one, other = (total_of(echoes, head.mask) for echoes in (right, flipped))
    change = (one.found.field_ppm - other.found.field_ppm)[head.mask]
    # one echo takes half a turn in all slices for field
    np.testing.assert_allclose(change, np.median(change), atol=2e-4)
    assert not any("slice" in note for note in one.notes)
    assert "every second slice along voxel axis 3 was half a turn off" in other.notes[0]


def test_a_real_multi_echo_scan(shared):
    """Three echoes of part of a head: no jumps, and a local field of the size of tissue's."""
    folder = shared / "data" / "gre_crop"
    # the slope in the phase's header is stale: the stored values are radians
    phase, magnitude = (
        np.asarray(nib.load(folder / name).dataobj.get_unscaled(), dtype=np.float32)
        for name in ("Phase.nii", "Mag.nii")
    )
    times, tesla = (0.004, 0.008, 0.012), 7.0
    geometry = Geometry(phase.shape[:3], (0.469, 0.469, 1.0), (0.0, 0.0, 1.0))
    echoes = Echoes(
        phase.transpose(3, 0, 1, 2), magnitude.transpose(3, 0, 1, 2), times, tesla, geometry
    )
    everywhere = np.ones(geometry.shape, dtype=bool)  # it was cut from inside the head
    found = total_of(echoes, everywhere)
    assert found.notes == []
    turn_ppm = 1 / (MEGAHERTZ_PER_TESLA * tesla * (times[1] - times[0]))
    field = found.found.field_ppm
    steps = [np.abs(np.diff(field, axis=axis)).max() / turn_ppm for axis in range(3)]
    assert max(steps) < 0.5
    local = local_field_from_total(
        found.found, everywhere, geometry, limit_bytes=1e9, stages=Stages()
    )
    assert 0.002 < np.std(local.field_ppm[local.mask]) < 0.03
