"""Methods in the C library: the maps of the Python kernels, without a model file."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from qsm_deploy.kernels.dipole import dipole_convolve, tkd
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise, field_noise
from qsm_deploy.kernels.inversion.total_variation import ITERATIONS, total_variation
from qsm_deploy.runtime.console.peak_memory import (
    peak_rss_bytes,
    reset_peak,
    return_freed_memory,
    rss_bytes,
)
from qsm_deploy.runtime.methods.inversion import THRESHOLD

TOLERANCE = 1e-5  # of the map's norm, float32; measured 4e-7
USAGE, DATA, ENGINE, MEMORY, CANCELLED = 2, 3, 4, 6, 130
each_grid = pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((30, 28, 32), ((1.0, 1.0, 1.0), (0.0, 0.0, 1.0))),
        ((27, 23, 19), ((0.8, 0.9, 2.0), (0.3, -0.2, 0.9))),
        ((9, 26, 31), ((2.5, 1.0, 1.0), (0.0, 0.6, 0.8))),
    ],
)


def acquisition(shape: tuple[int, int, int], grid: Any) -> tuple[Any, Any, Geometry]:
    """Return a noisy field, 0 outside a mask off the centre, and the grid of both."""
    rng = np.random.default_rng(3)
    geometry = Geometry(shape, *grid)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    mask = ((at - np.array([0.1, -0.1, 0.05])[:, None, None, None]) ** 2).sum(axis=0) < 0.7
    chi = gaussian_filter(rng.standard_normal(shape), 1.2).astype(np.float32) * mask
    chi *= np.float32(0.05) / chi.std()
    field = dipole_convolve(chi, geometry) + 0.0025 * rng.standard_normal(shape)
    return np.where(mask, field, 0).astype(np.float32), mask, geometry


def difference(chi: Any, expected: Any) -> float:
    return float(np.linalg.norm(chi - expected) / np.linalg.norm(expected))


def on(geometry: Geometry) -> tuple[Any, Any]:
    return geometry.voxel_size_mm, geometry.b0_direction


@each_grid
def test_tv_is_that_of_the_kernels(
    open_method: Callable[..., Any], facts: Any, shape: tuple[int, int, int], grid: Any
) -> None:
    field, mask, geometry = acquisition(shape, grid)
    sigma = field_noise(field, mask, geometry)
    alpha = alpha_of_noise(sigma, geometry)
    expected, found = total_variation(field, mask, geometry, alpha_ppm_mm=alpha, sigma_ppm=sigma)
    field[~mask] = np.nan  # not read
    engine = open_method("tv")
    chi = engine.reconstruct(field, mask, *on(geometry), facts=ctypes.pointer(facts))
    assert difference(chi, expected) < TOLERANCE
    assert not chi[~mask].any()
    assert facts.sigma_ppm == pytest.approx(sigma, rel=1e-5)
    assert facts.alpha_ppm_mm == pytest.approx(alpha, rel=1e-5)
    assert facts.last_change == pytest.approx(found.last_change, rel=1e-3)
    assert facts.iterations == ITERATIONS


def test_tv_takes_alpha_and_iterations(open_method: Callable[..., Any], facts: Any) -> None:
    field, mask, geometry = acquisition((17, 20, 18), ((1.0, 1.2, 0.9), (0.1, 0.2, 1.0)))
    asked = {"alpha_ppm_mm": 3e-4, "iterations": 4}
    expected, _ = total_variation(field, mask, geometry, sigma_ppm=1.0, **asked)
    chi = open_method("tv", threads=1).reconstruct(
        field, mask, *on(geometry), memory_order=0, facts=ctypes.pointer(facts), **asked
    )
    assert difference(chi, expected) < TOLERANCE
    assert (facts.alpha_ppm_mm, facts.iterations) == (3e-4, 4)


@pytest.mark.parametrize("threshold", [None, 0.12])
@each_grid
def test_tkd_is_that_of_the_kernels(
    open_method: Callable[..., Any], shape: tuple[int, int, int], grid: Any, threshold: float | None
) -> None:
    field, mask, geometry = acquisition(shape, grid)
    expected = tkd(field, geometry, threshold=threshold or THRESHOLD, pad_voxels=8) * mask
    chi = open_method("tkd").reconstruct(field, mask, *on(geometry), threshold=threshold or 0)
    assert difference(chi, expected) < TOLERANCE


def test_the_phantom_comes_back_better_from_tv(open_method: Callable[..., Any]) -> None:
    shape = (40, 44, 38)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    mask = (at**2).sum(axis=0) < 0.8
    chi = 0.1 * ((at - 0.15) ** 2).sum(axis=0).__lt__(0.1).astype(np.float32)
    noise = 0.002 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    field = dipole_convolve(chi, Geometry(shape)) + noise
    errors = []
    for method in ("tv", "tkd"):
        made = open_method(method).reconstruct(field, mask)
        made[mask] += (chi[mask] - made[mask]).mean()
        errors.append(np.linalg.norm((made - chi)[mask]) / np.linalg.norm(chi))
    assert errors[0] < 0.2 < errors[1]


def test_what_makes_no_sense_is_refused(
    library: Any, open_method: Callable[..., Any], call_error: Any
) -> None:
    with pytest.raises(call_error, match='no method "medi"; there are tv and tkd') as unknown:
        library.open_method("medi")
    assert unknown.value.status == USAGE
    field, mask, _ = acquisition((12, 9, 10), ((1, 1, 1), (0, 0, 1)))
    engines = {"tv": open_method("tv"), "tkd": open_method("tkd")}
    flat = np.full(field.shape, 0.01)
    for method, status, words, arguments, params in (
        ("tv", USAGE, "iterations is -1", (field, mask), {"iterations": -1}),
        ("tv", USAGE, "alpha_ppm_mm must be 0, or", (field, mask), {"alpha_ppm_mm": -1.0}),
        ("tv", USAGE, "threshold is for the method tkd", (field, mask), {"threshold": 0.1}),
        ("tv", USAGE, "take the whole volume", (field, mask), {"patch": 8}),
        ("tv", USAGE, "take the whole volume", (field, mask), {"blend": 1}),
        ("tkd", USAGE, "threshold must be 0, or", (field, mask), {"threshold": 0.7}),
        ("tkd", USAGE, "are for the method tv", (field, mask), {"alpha_ppm_mm": 1e-4}),
        ("tkd", USAGE, "fit the field", (field, mask), {"data_consistency_lambda": 0.01}),
        ("tv", DATA, "mask is empty", (field, 0 * mask), {}),
        ("tv", DATA, "looks like Hz", (1000 * field, mask), {}),
        ("tv", DATA, "voxel size must be", (field, mask, (1, 0, 1)), {}),
        ("tv", DATA, "the same in the whole mask", (flat, mask), {}),
        ("tv", MEMORY, "in the stage tv", (field, mask), {"memory_limit_bytes": 1000}),
        ("tkd", MEMORY, "in the stage tkd", (field, mask), {"memory_limit_bytes": 1000}),
    ):
        with pytest.raises(call_error, match=words) as caught:
            engines[method].reconstruct(*arguments, **params)
        assert caught.value.status == status
    assert engines["tv"].card is None
    assert np.isfinite(engines["tv"].reconstruct(flat, mask, alpha_ppm_mm=1e-4)).all()


def test_tv_stops_within_an_iteration(
    open_method: Callable[..., Any], call_error: Any, cancel: Any, progress: Any
) -> None:
    field, mask, _ = acquisition((12, 9, 10), ((1, 1, 1), (0, 0, 1)))
    seen: list[tuple[int, int]] = []
    asked: list[int] = []

    def stops() -> bool:
        asked.append(len(seen))
        return asked.count(2) == 2  # for the second time in the third iteration

    with pytest.raises(call_error, match="cancelled by the caller") as caught:
        open_method("tv").reconstruct(
            field, mask, cancel=cancel(stops), progress=progress(lambda *at: seen.append(at))
        )
    assert caught.value.status == CANCELLED
    assert seen == [(1, ITERATIONS), (2, ITERATIONS)]


@pytest.mark.parametrize(("method", "params"), [("tv", {"iterations": 1}), ("tkd", {})])
def test_memory_is_predicted(
    open_method: Callable[..., Any], collect: Any, method: str, params: Any
) -> None:
    field, mask, _ = acquisition((90, 100, 80), ((1, 1, 1), (0, 0, 1)))
    field, mask = np.ascontiguousarray(field), mask.astype(np.uint8)
    engine, lines = open_method(method), []
    engine.reconstruct(field, mask, log=collect(lines), **params)
    predicted = 2**20 * int(lines[0].split("predicted peak ")[1].split(" MiB")[0])
    return_freed_memory()
    reset_peak()
    before = rss_bytes() + field.nbytes  # the map, which the caller holds
    engine.reconstruct(field, mask, **params)
    assert peak_rss_bytes() - before == pytest.approx(predicted, rel=0.15)
