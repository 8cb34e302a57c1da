"""Prior maps as a card asks for them: which, of what, how often, on which grid, at what cost."""

import json
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise, field_noise
from qsm_deploy.kernels.inversion.grid import padded_box
from qsm_deploy.kernels.inversion.prior_maps import iterated_tkd, variation_maps
from qsm_deploy.runtime.card.card import PriorMap, TensorInfo
from qsm_deploy.runtime.reconstruction.pipeline import network_inputs
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps, variation_steps
from qsm_deploy.runtime.scan.scan import Scan

FIELD = "local_field_ppm"
GRID = Geometry((30, 36, 27), (1.1, 1.0, 1.3), (0.1, -0.3, 0.95))
RESIDUAL = PriorMap("residual", "tv_residual", FIELD, 4)
OF_RESIDUAL = PriorMap("of residual", "tkd", "residual", 3, threshold=0.12)
CHI = PriorMap("chi", "tv", FIELD, 4)
OF_FIELD = PriorMap("of field", "tkd", FIELD, 1, threshold=0.2)
INNER = PriorMap("inner", "tv_field", FIELD, 4)
PRIORS = (RESIDUAL, OF_RESIDUAL, CHI, OF_FIELD, INNER)
TOLERANCE = 0.15
PEAK = """
import json, sys
import nibabel as nib, numpy as np
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import PriorMap
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.prior_maps import prior_bytes, prior_maps
from qsm_deploy.runtime.scan.scan import Scan

def scan_of(shape):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(n // 8, -n // 8) for n in shape)] = True
    field = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32) * mask
    return Scan(field[None], mask, Geometry(shape), nib.Nifti1Header(), np.eye(4))

priors = [PriorMap(**prior) for prior in json.loads(sys.argv[1])]
prior_maps(priors, scan_of((12, 12, 12)))  # what is loaded when first used
scan, stages = scan_of((112, 128, 96)), Stages()
with stages("prepare"):
    made = prior_maps(priors, scan)
print(stages.peak_bytes["prepare"], prior_bytes(priors, scan))
"""


@pytest.fixture(scope="module")
def scan():
    """Return a head whose mask leaves room on its grid."""
    head = head_phantom(GRID, seed=7, noise_ppm=0.0025)
    field = (head.local_field_ppm * head.mask)[None]
    return Scan(field, head.mask, GRID, nib.Nifti1Header(), np.eye(4))


@pytest.fixture(scope="module")
def made(scan):
    return prior_maps(PRIORS, scan)


def test_they_come_by_name_and_in_order(made):
    assert list(made) == [prior.name for prior in PRIORS]


def test_total_variation_is_tuned_to_the_noise(scan, made):
    alpha = alpha_of_noise(field_noise(scan.measured[0], scan.mask, GRID), GRID)
    expected = variation_maps(scan.measured[0], scan.mask, GRID, alpha_ppm_mm=alpha, iterations=4)
    for name, volume in zip(("chi", "inner", "residual"), expected, strict=True):
        assert np.array_equal(made[name], volume)


@pytest.mark.parametrize("prior", [OF_RESIDUAL, OF_FIELD], ids=lambda prior: prior.name)
def test_tkd_is_of_what_it_says_with_room_around_the_mask(scan, made, prior):
    grid, field = padded_box(scan.mask, GRID), made.get(prior.of, scan.measured[0])
    inside = grid.embed_mask(scan.mask)
    chi = iterated_tkd(
        grid.embed(field), inside, grid.geometry, threshold=prior.threshold, steps=prior.steps
    )
    assert np.array_equal(made[prior.name], grid.restore(chi))
    assert np.abs(chi).max() > 0.01


def test_what_a_field_has_outside_the_mask_makes_no_difference(scan, made):
    noise = np.random.default_rng(0).normal(0, 1, GRID.shape).astype(np.float32)
    measured = np.where(scan.mask, scan.measured[0], noise)[None]
    for name, volume in prior_maps(PRIORS, replace(scan, measured=measured)).items():
        assert np.array_equal(volume, made[name])
        assert not volume[~scan.mask].any()


def test_total_variation_of_some_steps_is_made_once(scan, made):
    told = []
    priors = (*PRIORS, replace(CHI, name="further", steps=7))
    again = prior_maps(priors, scan, lambda: told.append(True))
    assert len(told) == variation_steps(priors) == 4 + 7
    assert np.array_equal(again["chi"], made["chi"])
    assert not np.array_equal(again["further"], made["chi"])
    assert variation_steps((OF_FIELD,)) == 0


def test_a_network_is_given_them_with_the_noise_as_its_card_says(scan, card, made):
    volumes = ("n", 1, "x", "y", "z")
    maps = [TensorInfo(prior.name, "ppm", volumes) for prior in PRIORS[::-1]]
    noise = TensorInfo("field_noise_ppm", "ppm", (1,))
    taking = replace(card, inputs=(*card.inputs, *maps, noise), priors=PRIORS)
    inputs = network_inputs(taking, scan)
    assert list(inputs) == [FIELD, *(prior.name for prior in PRIORS[::-1]), "field_noise_ppm"]
    for prior in PRIORS:
        assert np.array_equal(inputs[prior.name], made[prior.name][None])
    sigma = inputs["field_noise_ppm"]
    assert (sigma.dtype, sigma.shape) == (np.float32, (1,))
    assert sigma[0] == np.float32(field_noise(scan.measured[0], scan.mask, GRID))
    assert 0.002 < sigma[0] < 0.004


@pytest.mark.parametrize(
    ("taken", "priors"),
    [
        (TensorInfo("chi", "ppm", ("n", 1, "x", "y", "z")), (CHI,)),
        (TensorInfo("field_noise_ppm", "ppm", (1,)), ()),
    ],
    ids=["prior map", "noise"],
)
def test_a_field_without_anything_in_it_is_refused(scan, card, taken, priors):
    taking = replace(card, inputs=(*card.inputs, taken), priors=priors)
    with pytest.raises(DataError, match="the field is the same everywhere"):
        network_inputs(taking, replace(scan, measured=np.zeros_like(scan.measured)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "priors",
    [
        (CHI,),
        (OF_FIELD,),
        (replace(OF_FIELD, steps=3),),
        PRIORS,
        (CHI, replace(CHI, name="further", steps=2)),
    ],
    ids=lambda priors: ", ".join(f"{prior.method} {prior.steps}" for prior in priors),
)
def test_the_peak_is_predicted(priors):
    said = json.dumps([vars(prior) for prior in priors])
    command = [sys.executable, "-c", PEAK, said]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, predicted = map(float, done.stdout.split())
    assert abs(predicted / measured - 1) <= TOLERANCE
