"""The loops against plain ones in complex double precision, with a prior that does something."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import TensorInfo
from qsm_deploy.runtime.reconstruction.unrolled import nextqsm, reconstruct_unrolled
from qsm_deploy.runtime.scan.scan import Scan

DIRECTIONS = ((0.0, 0.0, 1.0), (0.0, 0.6, 0.8), (0.48, 0.6, 0.64))
LPCNN = {"alpha": 1.5, "iterations": 3}
MODL = {"step": 1.1, "iterations": 3}
NEXTQSM = {"iterations": 3, "lambda_1": 0.25, "lambda_2": 0.5, "lambda_3": 0.125}
SPINET = {"lambda": 0.0378, "p": 1.58, "iterations": 3, "cg_steps": 25}
ONE = {"chi_mean": -2e-4, "chi_std": 0.028}
TWO = {"chi_mean": -2e-3, "chi_std": 0.026, "field_mean": -5e-4, "field_std": 4e-3}


@pytest.fixture(params=[(16, 14, 12), (15, 13, 11)])
def scan(request) -> Scan:
    rng = np.random.default_rng(5)
    shape = request.param
    mask = np.zeros(shape, dtype=bool)
    mask[2:-2, 2:-3, 1:-2] = True
    fields = 0.02 * rng.standard_normal((3, *shape), dtype=np.float32) * mask
    grid = Geometry(shape, (1.0, 0.9, 1.4), DIRECTIONS[0])
    return Scan(
        fields, mask, grid, nib.Nifti1Header(), np.eye(4), more_b0_directions=DIRECTIONS[1:]
    )


def with_fields(scan: Scan, count: int) -> Scan:
    return replace(scan, measured=scan.measured[:count], more_b0_directions=DIRECTIONS[1:count])


def prior(x):
    """Return something neither linear nor local in the channels, smooth like a trained network."""
    return np.tanh(0.7 * x) + 0.1 * np.roll(x, 1, axis=0) + 0.05


def multiplier(grid: Geometry, direction, power: int) -> np.ndarray:
    def dipole(sign: int) -> np.ndarray:
        axes = []
        for n, d in zip(grid.shape, grid.voxel_size_mm, strict=True):
            k = np.fft.fftfreq(n, d)
            axes.append(k if sign > 0 else np.roll(k[::-1], 1))
        kx, ky, kz = np.meshgrid(*axes, indexing="ij")
        k2 = kx**2 + ky**2 + kz**2
        k2[0, 0, 0] = 1
        b = np.array(direction) / np.linalg.norm(direction)
        d = 1 / 3 - (kx * b[0] + ky * b[1] + kz * b[2]) ** 2 / k2
        d[0, 0, 0] = 0
        return d

    return (dipole(1) ** power + dipole(-1) ** power) / 2


def applied(e: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.fft.ifftn(e * np.fft.fftn(x, axes=(-3, -2, -1)), axes=(-3, -2, -1))


def lpcnn_twin(scan: Scan, *, joint: bool = False) -> np.ndarray:
    mask = scan.mask.astype(float)
    alpha, mean, std = LPCNN["alpha"], ONE["chi_mean"], ONE["chi_std"]
    first, second = (
        [multiplier(scan.geometry, b, power) for b in DIRECTIONS[: len(scan.measured)]]
        for power in (1, 2)
    )
    b = [alpha * applied(e, f).real for e, f in zip(first, scan.measured, strict=True)]
    x = None
    for _ in range(3):
        if x is None:
            z = sum(b)
        else:
            z = x
            for b_n, e in zip(b, second, strict=True):
                z = z + b_n - alpha * applied(e, x if joint else z).real
        x = (prior(((z - mean) / std * mask)[None])[0] * std + mean) * mask
    return x


def modl_twin(scan: Scan) -> np.ndarray:
    mask, field = scan.mask.astype(float), scan.measured[0].astype(float)
    e = multiplier(scan.geometry, DIRECTIONS[0], 1)
    mean = np.array([TWO["chi_mean"], TWO["field_mean"]]).reshape(2, 1, 1, 1)
    std = np.array([TWO["chi_std"], TWO["field_std"]]).reshape(2, 1, 1, 1)
    y = MODL["step"] * np.stack([applied(e, field).real, field])
    z = x = y
    for k in range(3):
        if k:
            r = applied(e, x[0]).real + x[1]
            z = x - MODL["step"] * np.stack([applied(e, r).real, r]) + y
        x = prior((z - mean) / std * mask) * mask * std + mean
    return x[0] * mask


def spinet_twin(scan: Scan) -> np.ndarray:
    """Return the map with the weighted system solved to convergence where 25 steps allow it."""
    mask, field = scan.mask.astype(float), scan.measured[0].astype(float)
    mean, std = ONE["chi_mean"], ONE["chi_std"]
    e, e2 = (multiplier(scan.geometry, DIRECTIONS[0], power) for power in (1, 2))
    b = applied(e, field)
    x = b
    for _ in range(3):
        x = x * mask
        p = prior((np.stack([x.real, x.imag]) - mean) / std) * std + mean
        z = p[0] + 1j * p[1]
        w2 = SPINET["lambda"] * np.maximum(np.abs(x - z), 1e-6) ** (SPINET["p"] - 2)
        right = b + w2 * z
        x = np.zeros_like(z)
        r = direction = right
        for _ in range(25):
            if (np.abs(r) ** 2).sum() < 1e-10:
                break
            image = applied(e2, direction) + w2 * direction
            length = (np.abs(r) ** 2).sum() / np.vdot(direction, image)
            x, new = x + length * direction, r - length * image
            direction = new + (np.abs(new) ** 2).sum() / (np.abs(r) ** 2).sum() * direction
            r = new
        x = x * mask
    return x.real * mask


def card_for(card, pipeline, channels, constants, normalisation):
    shape = ("n", channels, "x", "y", "z")
    return replace(
        card,
        pipeline=pipeline,
        patchable="split",
        inputs=(TensorInfo("prior_input", "1", shape),),
        output=TensorInfo("prior_output", "1", shape),
        constants=constants,
        normalisation=normalisation,
    )


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.dtype == np.float32
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lpcnn(scan, card, count):
    few = with_fields(scan, count)
    got = reconstruct_unrolled(card_for(card, "lpcnn", 1, LPCNN, ONE), few, prior)
    assert difference(got, lpcnn_twin(few)) <= 1e-5
    if count > 1:
        assert difference(got, lpcnn_twin(few, joint=True)) > 1e-2


def test_modl(scan, card):
    one = with_fields(scan, 1)
    got = reconstruct_unrolled(card_for(card, "modl", 2, MODL, TWO), one, prior)
    assert difference(got, modl_twin(one)) <= 1e-5


def test_spinet(scan, card):
    one = with_fields(scan, 1)
    got = reconstruct_unrolled(card_for(card, "spinet", 2, SPINET, ONE), one, prior)
    assert difference(got, spinet_twin(one)) <= 1e-5


@pytest.mark.parametrize(
    ("pipeline", "channels", "constants", "normalisation"),
    [("lpcnn", 1, LPCNN, ONE), ("modl", 2, MODL, TWO), ("spinet", 2, SPINET, ONE)],
)
def test_outside_the_mask_the_map_is_zero(scan, card, pipeline, channels, constants, normalisation):
    loop = card_for(card, pipeline, channels, constants, normalisation)
    chi = reconstruct_unrolled(loop, with_fields(scan, 1), prior)
    assert chi.shape == scan.mask.shape
    assert not chi[~scan.mask].any()
    assert chi[scan.mask].any()


def nextqsm_twin(scan: Scan, crop_field: bool = False) -> np.ndarray:
    """Return the map of the loop in double precision, on the grid of 64 voxels a side."""
    mask, shape = scan.mask.astype(float), scan.mask.shape
    odd = [n % 2 for n in shape]
    front = [o + (64 - n - o) // 2 for n, o in zip(shape, odd, strict=True)]
    inside = tuple(slice(f, f + n) for f, n in zip(front, shape, strict=True))
    k = np.meshgrid(*(np.fft.fftfreq(64, d) for d in scan.geometry.voxel_size_mm), indexing="ij")
    along = sum(a * b for a, b in zip(k, scan.geometry.b0_direction, strict=True))
    dipole = 1 / 3 - along**2 / (sum(a * a for a in k) + 2.0**-23)

    def placed(x: np.ndarray) -> np.ndarray:
        whole = np.zeros((64, 64, 64))
        whole[inside] = x
        return whole

    def field(x: np.ndarray) -> np.ndarray:
        return np.fft.ifftn(dipole * np.fft.fftn(x)).real

    b = placed(scan.measured[0] * mask)
    x = b[inside]
    for step in range(1, 4):
        r = field(placed(x)) - b
        if crop_field:
            r = placed(r[inside] * mask)
        misfit = 100 * field(r) / np.sqrt((b**2).sum() * (r**2).sum())
        x = (
            x - NEXTQSM[f"lambda_{step}"] * misfit[inside] - 1000 * prior(x[None])[0] / 64**3
        ) * mask
    return x


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nextqsm_equals_its_twin(scan: Scan, direction) -> None:
    grid = Geometry(scan.mask.shape, (1.0, 0.9, 1.4), direction)
    one = replace(with_fields(scan, 1), geometry=grid)
    got = nextqsm(one, lambda x: 1000 * prior(x), NEXTQSM, {})
    expected = nextqsm_twin(one)
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(got - nextqsm_twin(one, crop_field=True)).max() > 1e-3 * np.abs(expected).max()


def test_nextqsm_refuses_a_field_of_nothing(scan: Scan) -> None:
    nothing = replace(with_fields(scan, 1), measured=np.zeros_like(scan.measured[:1]))
    with pytest.raises(DataError, match="the local field is 0 in the whole mask"):
        nextqsm(nothing, prior, NEXTQSM, {})
