"""Two-prior projection against the closed form of what it solves, on a grid of few voxels."""

import numpy as np
import pytest

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.grid import grown
from qsm_deploy.kernels.threads import using_threads
from qsm_deploy.runtime.local_field.background.removal import Task, padded
from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior

GRID = Geometry((9, 8, 7), (2.0, 2.5, 3.0), (0.4, -0.3, 0.9))


def closed_form(task, method):
    """Return the most likely local field: ``x = P D' w (w D P D' w + n^2)^-1 w f``.

    Where the field is not trusted it is what the inner ones of these sources make.
    """
    grid = padded(task, method)
    inside, trusted = grid.embed_mask(task.mask), grid.embed_mask(task.trusted)
    near = grown(inside, grid.geometry, method.rim_mm)
    variance = np.where(near, method.inner_ppm, method.outer_ppm) ** 2
    rows = []
    for voxel in np.argwhere(inside):
        unit = np.zeros(grid.geometry.shape)
        unit[tuple(voxel)] = 1
        rows.append(dipole_convolve(unit, grid.geometry).ravel())
    dipole, seen = np.array(rows), trusted[inside]
    known = dipole[seen]
    field = task.field_ppm[task.mask].astype(float)
    field -= field[seen].mean()
    noise = method.noise_ppm**2 * np.eye(len(known))
    gram = (known * variance.ravel()) @ known.T + noise
    sources = variance.ravel() * (known.T @ np.linalg.solve(gram, field[seen]))
    field[~seen] = dipole[~seen] @ sources
    return field - dipole @ np.where(inside.ravel(), 0, sources)


def test_the_number_of_threads_does_not_matter(head, background, geometry):
    task = Task(head.local_field_ppm + background, head.mask, head.mask, geometry)
    results = []
    for threads in (1, 3):
        with using_threads(threads):
            results.append(TwoPrior(iterations=20)(task)[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("lost", [0, 7])
def test_it_is_the_closed_form(lost):
    random = np.random.default_rng(5)
    mask = np.zeros(GRID.shape, bool)
    mask[2:7, 1:7, 2:6] = random.random((5, 6, 4)) < 0.9
    trusted = mask.copy()
    trusted[tuple(np.argwhere(mask)[:lost].T)] = False
    field = (0.1 * random.standard_normal(GRID.shape)).astype(np.float32)
    method = TwoPrior(around_mm=6, noise_ppm=0.02, iterations=600)
    task = Task(field, mask, trusted, GRID)
    local, _ = method(task)
    expected = closed_form(task, method)
    assert np.std(expected) < 0.9 * np.std(field[mask])
    np.testing.assert_allclose(local[mask], expected, atol=2e-4 * np.abs(expected).max())
