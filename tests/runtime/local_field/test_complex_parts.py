"""Real and imaginary parts of one complex image, and those that a header scaled apart."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.local_field.complex_parts import require_parts_of_one

SHAPE = (40, 44, 36)
NAMES = ("re.nii", "im.nii")
RNG = np.random.default_rng(9)
RADIUS = sum(a**2 for a in np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
HEAD = RADIUS < 0.7


def parts(noise=0.02, turns=1.5):
    """Return the parts of a head whose phase turns along z."""
    phase = 2 * np.pi * turns * np.linspace(-0.5, 0.5, SHAPE[2]) * np.ones(SHAPE)
    signal = HEAD * np.exp(1j * phase)
    signal += noise * (RNG.standard_normal(SHAPE) + 1j * RNG.standard_normal(SHAPE))
    return [part.astype(np.float32) for part in (signal.real, signal.imag)]


@pytest.mark.parametrize("turns", [0.0, 0.05, 1.5])
def test_parts_of_one_image_pass(turns):
    require_parts_of_one(NAMES, parts(turns=turns))
    require_parts_of_one(NAMES, [np.rint(1000 * part) for part in parts(turns=turns)])
    require_parts_of_one(NAMES, [part * HEAD for part in parts(turns=turns)])
    require_parts_of_one(NAMES, [gaussian_filter(part, 1.0) for part in parts(turns=turns)])


def test_a_head_that_fills_the_corners_passes():
    real, imaginary = (part[12:28, 12:28, 12:24] for part in parts(turns=0.3))
    assert abs(real.mean()) > 3 * abs(imaginary.mean())
    require_parts_of_one(NAMES, [real, imaginary])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda real, imaginary: (real, 2 * imaginary), "re.nii and im.nii have noise of"),
        (lambda real, imaginary: (0.5 * real, imaginary), "of one complex image it is the same"),
        (lambda real, imaginary: (real, imaginary + 0.5), r"im.nii is 0.4.* in the corners"),
        (lambda real, imaginary: (real + 1.3, imaginary), "re.nii is 1.3 in the corners"),
        (
            lambda real, imaginary: (real + 1.3, imaginary + 1.3),
            "re.nii and im.nii are nowhere negative",
        ),
    ],
)
def test_a_part_that_was_scaled_or_shifted_is_refused(spoil, says):
    with pytest.raises(DataError, match=says):
        require_parts_of_one(NAMES, spoil(*parts()))
