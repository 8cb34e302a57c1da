"""R2* of decays that are known."""

from dataclasses import replace

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.local_field.echoes import Echoes
from qsm_deploy.runtime.local_field.relaxation import r2_star

SHAPE = (21, 19, 17)
TIMES = (0.004, 0.010, 0.016, 0.022, 0.028)
RATE = np.random.default_rng(0).uniform(0, 300, SHAPE).astype(np.float32)
MASK = np.indices(SHAPE).sum(axis=0) % 5 > 0


def echoes_of(rate, times, snr=None):
    rng = np.random.default_rng(1)
    signal = np.stack([1000 * np.exp(-t * rate) for t in times])
    if snr is not None:
        parts = rng.standard_normal((2, *signal.shape)) * 1000 / snr
        signal = np.hypot(signal + parts[0], parts[1])
    signal = signal.astype(np.float32)
    geometry = Geometry(SHAPE, (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))
    return Echoes(np.zeros_like(signal), signal, times, 3.0, geometry)


@pytest.mark.parametrize("times", [TIMES[:3], TIMES, (0.001, 0.004, 0.02)])
def test_a_clean_decay_is_exact(times):
    found = r2_star(echoes_of(RATE, times), MASK)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[MASK], RATE[MASK], rtol=1e-3, atol=0.05)
    assert not found[~MASK].any()


def test_noise_spreads_it_as_much_as_it_must():
    rate = np.full(SHAPE, 25, np.float32)
    found = r2_star(echoes_of(rate, TIMES, snr=60), MASK)[MASK]
    weight = np.exp(-2 * 25 * np.asarray(TIMES))
    centred = np.asarray(TIMES) - np.average(TIMES, weights=weight)
    least = 1 / 60 / np.sqrt(np.sum(weight * centred**2))  # Cramer-Rao
    assert abs(found.mean() - 25) < 0.1 * least
    assert 0.95 < found.std() / least < 1.1


def test_noise_alone_is_bounded_and_not_negative():
    found = r2_star(echoes_of(np.full(SHAPE, 1e4, np.float32), TIMES, snr=30), MASK)
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() < 2000


def test_voids_and_signal_that_grows():
    echoes = echoes_of(RATE, TIMES)
    echoes.magnitude[:, :5] = 0
    echoes.magnitude[1:, 5:8] = 0
    echoes.magnitude[:, 8:10] = np.arange(1, 6, dtype=np.float32)[:, None, None, None]
    found = r2_star(echoes, MASK)
    assert not found[:10].any()
    np.testing.assert_allclose(found[10:][MASK[10:]], RATE[10:][MASK[10:]], rtol=1e-3, atol=0.05)


def test_whole_numbers():
    echoes = echoes_of(RATE, TIMES)
    whole = np.rint(echoes.magnitude)
    expected = r2_star(replace(echoes, magnitude=whole), MASK)
    found = r2_star(replace(echoes, magnitude=whole.astype(np.int16)), MASK)
    np.testing.assert_array_equal(found, expected)


def test_two_echoes():
    with pytest.raises(DataError, match="R2\\* needs 3 echoes, got 2; drop --r2star"):
        r2_star(echoes_of(RATE, TIMES[:2]), MASK)
