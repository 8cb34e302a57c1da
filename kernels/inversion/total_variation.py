"""Total variation: of all maps that explain the field, the one with the least edges.

``min_x 1/2 |W (D x - f)|^2 + alpha sum_a |M_a G_a x|_1``, ``x = 0`` outside the support, by ADMM
with ``z1 = G x``, ``z2 = D x``, ``z3 = x``. Every iteration asks for ``q = z - s`` of each (``s``
the scaled dual) and takes what comes nearest to all three::

    X  = (F b + mu2 D F q2) / (mu2 D^2 + mu1 L + mu3),   b = mu3 q3 + mu1 G^T q1
    v1 = G x + s1 ;  s1 = clip(v1, +-M alpha / mu1) ;   q1 = v1 - 2 s1
    v2 = D x + s2 ;  s2 = g (v2 - f) ;                   q2 = v2 - 2 s2,   g = W^2 / (W^2 + mu2)
    q3 = x in the support, q3 - x outside

where mu1 grows with alpha and falls with the field, so that a field and a noise twice as large give
twice the map.

With W = 1 inside the mask, g is a half there and ``q2 = f``: outside, the field is filled in by
what is predicted. It takes four transforms an iteration.

References
----------
Boyd et al., Found Trends Mach Learn 3:1-122 (2011): ADMM.
Bilgic et al., Magn Reson Med 72:1444-1459 (2014): splitting for QSM.
Liu et al., Magn Reson Med 66:777-783 (2011): the edge mask M of a magnitude (MEDI).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from qsm_deploy.kernels.dipole import dipole_convolve, half_dipole_kernel, tkd
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.gradients import laplacian_eigenvalues
from qsm_deploy.kernels.inversion.grid import (
    SUPPORT_MM,
    PaddedBox,
    each_slab,
    grown,
    padded_box,
)
from qsm_deploy.kernels.threads import workers

MU2, MU3 = 1.0, 0.01
STEP_PER_FIELD = 1.0  # alpha / mu1, by how much edges shrink at once, in rms fields per mm
START_THRESHOLD = 0.2  # of the TKD map that the iteration starts from
ITERATIONS = 30
TINY = 1e-12  # ppm, for a field of zeros
HUBER_ITERATIONS = 20  # by which outliers are found
HUBER_SIGMAS, DROPPED_SIGMAS = 4.0, 6.0
CLIPPED = 5.0  # beyond that many 99.9th percentiles a single voxel would rule the first map
OUTLIER_SIGMAS = 10.0  # of the final map
MOST_TRUST = 10.0  # of a voxel, in medians


@dataclass(frozen=True)
class Facts:
    """What a run found.

    Attributes
    ----------
    iterations
        That were made.
    last_change
        ``|x - x_before| / |x|`` of the last one.
    fitted_residual
        ``|W (D x - f)| / |W f|``, with the sources outside the mask.
    outliers
        Share of the mask whose field was not explained within 10 sigma, by their weight.
    padded_shape
        Of the grid that was transformed.
    """

    iterations: int
    last_change: float
    fitted_residual: float
    outliers: float
    padded_shape: tuple[int, int, int]


class DataTerm(Protocol):
    """What the prediction of the field is asked to be next."""

    def ask(self, predicted: Volume, rows: slice) -> None:
        """Turn ``D x`` of some planes into their ``q2``, in place."""


class EvenTerm:
    """Every voxel of the mask is trusted alike."""

    def __init__(self, field_ppm: Volume, mask: Mask) -> None:
        self.field_ppm, self.mask = field_ppm, mask

    def ask(self, predicted: Volume, rows: slice) -> None:
        """Put the field where it was measured."""
        np.copyto(predicted, self.field_ppm[rows], where=self.mask[rows])


class WeightedTerm:
    """Voxels are trusted by their squared weight W^2; with a limit of ``W r``, by Huber's."""

    def __init__(self, field_ppm: Volume, squared: Volume, huber_ppm: float | None = None) -> None:
        self.field_ppm, self.squared, self.huber_ppm = field_ppm, squared, huber_ppm
        self._s2 = np.zeros_like(field_ppm)

    def ask(self, predicted: Volume, rows: slice) -> None:
        """Step towards the field by the weight."""
        s2, squared = self._s2[rows], self.squared[rows]
        predicted += s2
        np.subtract(predicted, self.field_ppm[rows], out=s2)
        s2 *= squared / (squared + np.float32(MU2))
        if self.huber_ppm is not None:
            most = np.sqrt(squared) * np.float32(self.huber_ppm / MU2)
            np.clip(s2, -most, most, out=s2)
        predicted -= s2
        predicted -= s2


class Solver:
    """The state of the iteration, on the padded grid.

    Parameters
    ----------
    field_ppm
        (x, y, z) float32, 0 outside the mask [ppm].
    mask, support
        Where it was measured, and where sources may be.
    geometry
        The padded grid.
    alpha_ppm_mm
        Weight of the edges, positive [ppm mm].
    edges
        (3, x, y, z) M along each axis, False where an edge is free; ``None`` is True everywhere.
    """

    def __init__(
        self,
        field_ppm: Volume,
        mask: Mask,
        support: Mask,
        geometry: Geometry,
        alpha_ppm_mm: float,
        edges: NDArray[np.bool_] | None = None,
    ) -> None:
        self._geometry, self._support, self._edges = geometry, support, edges
        self.field_ppm, self.mask = field_ppm, mask
        rms_ppm = float(np.linalg.norm(field_ppm)) / math.sqrt(np.count_nonzero(mask))
        self._limit = max(STEP_PER_FIELD * rms_ppm, TINY)
        self._mu1 = alpha_ppm_mm / self._limit
        self._d = half_dipole_kernel(geometry)
        self._inverse = self._inverse_of_normal()
        self._s1 = np.zeros((3, *geometry.shape), dtype=np.float32)
        self._b = np.empty_like(field_ppm)

    def start(self, term: DataTerm) -> None:
        """Begin from a masked TKD map, with duals of zero."""
        self.x = tkd(self.field_ppm, self._geometry, threshold=START_THRESHOLD)
        self.x *= self.mask
        self._q2 = dipole_convolve(self.x, self._geometry)
        self._q3 = self.x.copy()
        self._ask(term, limit=0)

    def iterate(self, count: int, term: DataTerm, done: Callable[[], object]) -> float:
        """Make so many iterations and return the relative change of the last."""
        for n in range(count):
            before = self.x if n == count - 1 else None
            self._step()
            if before is not None:
                before -= self.x
                size = max(float(np.linalg.norm(self.x)), 1e-30)
                change = float(np.linalg.norm(before)) / size
            if n < count - 1:
                self._ask(term, self._limit)
            done()
        return change

    @property
    def predicted_ppm(self) -> Volume:
        """The field of the last iteration's map."""
        return self._q2

    def missed_by(self, limit_ppm: float, squared_weight: Volume | None) -> Mask:
        """Return where ``|W (D x - f)|`` of the last iteration is that large."""
        squared = self.mask if squared_weight is None else squared_weight
        missed: Mask = np.zeros_like(self.mask)

        def compare(rows: slice) -> None:
            error = self._q2[rows] - self.field_ppm[rows]
            np.greater(error * error * squared[rows], limit_ppm**2, out=missed[rows])

        each_slab(compare, missed.shape)
        return missed

    def residual(self, squared_weight: Volume | None) -> float:
        """Return ``|W (D x - f)| / |W f|`` of the last iteration, W the mask unless given."""
        squared = self.mask if squared_weight is None else squared_weight
        sums = np.zeros((2, len(self._q2)))

        def add(rows: slice) -> None:
            field, w2 = self.field_ppm[rows], squared[rows]
            for n, off in enumerate((self._q2[rows] - field, field)):
                np.sum(off * off * w2, axis=(1, 2), dtype=np.float64, out=sums[n, rows])

        each_slab(add, self._q2.shape)
        missed, whole = np.sqrt(sums.sum(axis=1))
        return float(missed / max(whole, 1e-30))

    def _step(self) -> None:
        """Solve for the map and its field: X and D X from b and q2."""
        spectrum = scipy.fft.rfftn(self._b, workers=workers())
        solution = scipy.fft.rfftn(self._q2, workers=workers())
        del self.x, self._q2

        each_slab(partial(self._solve, spectrum, solution), spectrum.shape)
        self.x = scipy.fft.irfftn(solution, s=self._geometry.shape, workers=workers())
        del solution
        self._q2 = scipy.fft.irfftn(spectrum, s=self._geometry.shape, workers=workers())

    def _solve(
        self, spectrum: NDArray[np.complex64], solution: NDArray[np.complex64], rows: slice
    ) -> None:
        """Turn some planes of F b and F q2 into those of D X and X."""
        d, x = self._d[rows], solution[rows]
        x *= d
        x += spectrum[rows]
        x *= self._inverse[rows]
        np.multiply(x, d, out=spectrum[rows])

    def _ask(self, term: DataTerm, limit: float) -> None:
        """Update the duals, and ask for q1 and q3 in b, and for q2."""
        steps = 1 / np.asarray(self._geometry.voxel_size_mm, dtype=np.float32)
        lasts: dict[int, Volume] = {}  # q1 of each slab's last plane, which its neighbour waits for

        def ask(rows: slice) -> None:
            x, q3, b = self.x[rows], self._q3[rows], self._b[rows]
            q3 -= x
            np.copyto(q3, x, where=self._support[rows])
            np.multiply(q3, np.float32(MU3), out=b)
            after = self.x[rows.stop % len(self.x)]
            for axis in range(3):
                q1 = _difference(x, after, axis)
                q1 *= steps[axis]
                s1 = self._s1[axis, rows]
                q1 += s1
                np.clip(q1, -limit, limit, out=s1)
                if self._edges is not None:
                    s1 *= self._edges[axis, rows]
                q1 -= s1
                q1 -= s1
                q1 *= np.float32(self._mu1) * steps[axis]
                _add_adjoint(b, q1, axis)
                if axis == 0:
                    lasts[rows.stop % len(self.x)] = q1[-1].copy()
            term.ask(self._q2[rows], rows)

        each_slab(ask, self.x.shape)
        for plane, last in lasts.items():
            self._b[plane] += last

    def _inverse_of_normal(self) -> Volume:
        lx, ly, lz = laplacian_eigenvalues(self._geometry)
        inverse = np.empty_like(self._d)

        def fill(rows: slice) -> None:
            normal = lx[rows] + ly + lz
            normal *= np.float32(self._mu1)
            normal += np.float32(MU3)
            normal += np.float32(MU2) * self._d[rows] ** 2
            np.reciprocal(normal, out=inverse[rows])

        each_slab(fill, inverse.shape)
        return inverse


def total_variation(
    field_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    *,
    alpha_ppm_mm: float,
    sigma_ppm: float,
    weight: Volume | None = None,
    edges: NDArray[np.bool_] | None = None,
    iterations: int = ITERATIONS,
    support_mm: float = SUPPORT_MM,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, Facts]:
    """Return the map of least total variation that explains a local field.

    Parameters
    ----------
    field_ppm
        (x, y, z) local field [ppm]; what lies outside the mask is not looked at.
    mask
        (x, y, z) bool, True where it was measured.
    geometry
        The grid of both; any voxel size and B0 direction.
    alpha_ppm_mm
        Weight of the edges [ppm mm], positive; see :func:`..field_noise.alpha_of_noise`.
    sigma_ppm
        Noise of most of the field [ppm], which tells outliers.
    weight
        (x, y, z) trust in each voxel, of any scale, 0 for none, ten times its median at most;
        ``None`` trusts all alike.
    edges
        (3, x, y, z) bool, False where an edge from a voxel to the next along an axis costs nothing,
        as none does across the boundary of the mask; ``None`` penalises all.
    iterations
        Number of them, positive.
    support_mm
        How far outside the mask there may be sources, which take up what background removal left.
    done
        Called after every iteration.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask; its mean is that of the iteration, near 0.
    Facts
        What was found.

    Raises
    ------
    UsageError
        If alpha or the number of iterations is not positive.
    DataError
        If the mask is empty.
    """
    if not 0 < alpha_ppm_mm < np.inf:
        raise UsageError(f"alpha must be positive and finite, got {alpha_ppm_mm:g} ppm mm")
    if iterations < 1:
        raise UsageError(f"the number of iterations must be positive, got {iterations}")
    grid, solver, squared = _prepared(
        field_ppm, mask, geometry, alpha_ppm_mm, weight, edges, support_mm
    )
    term: DataTerm = EvenTerm(solver.field_ppm, solver.mask)
    if squared is not None:
        term = WeightedTerm(solver.field_ppm, squared)
    solver.start(term)
    change = solver.iterate(iterations, term, done)
    missed = solver.missed_by(OUTLIER_SIGMAS * sigma_ppm, squared)
    facts = Facts(
        iterations,
        change,
        solver.residual(squared),
        float(missed[solver.mask].mean()),
        grid.geometry.shape,
    )
    solver.x *= solver.mask
    return grid.restore(solver.x), facts


def solved(
    field_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    *,
    alpha_ppm_mm: float,
    iterations: int,
    done: Callable[[], object],
) -> tuple[PaddedBox, Solver]:
    """Return what :func:`total_variation` solves, all voxels trusted alike, on its padded grid."""
    grid, solver, _ = _prepared(field_ppm, mask, geometry, alpha_ppm_mm, None, None, SUPPORT_MM)
    term = EvenTerm(solver.field_ppm, solver.mask)
    solver.start(term)
    solver.iterate(iterations, term, done)
    return grid, solver


def without_outliers(
    field_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    *,
    alpha_ppm_mm: float,
    sigma_ppm: float,
    weight: Volume | None = None,
    edges: NDArray[np.bool_] | None = None,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, Mask]:
    """Return a field with what a map says in place of what no map explains, and where that is.

    The map is found with Huber's penalty. Parameters, values outside the mask and errors are those
    of :func:`total_variation`.

    Returns
    -------
    (x, y, z) float32 array
        The field [ppm], 0 outside the mask.
    (x, y, z) bool array
        True where it was off by more than 6 sigma, by the weight.
    """
    most = CLIPPED * np.quantile(np.abs(field_ppm[mask]), 0.999)
    grid, solver, squared = _prepared(
        np.clip(field_ppm, -most, most),
        mask,
        geometry,
        alpha_ppm_mm,
        mask.astype(np.float32) if weight is None else weight,
        edges,
        SUPPORT_MM,
    )
    assert squared is not None
    term = WeightedTerm(solver.field_ppm, squared, HUBER_SIGMAS * sigma_ppm)
    solver.start(term)
    solver.iterate(HUBER_ITERATIONS, term, done)
    missed = solver.missed_by(DROPPED_SIGMAS * sigma_ppm, squared)
    where = np.zeros_like(mask)
    where[grid.box] = missed[grid.inner]
    filled = np.where(mask, field_ppm, np.float32(0))
    filled[where] = solver.predicted_ppm[missed]
    return filled, where


def _prepared(
    field_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    alpha_ppm_mm: float,
    weight: Volume | None,
    edges: NDArray[np.bool_] | None,
    support_mm: float,
) -> tuple[PaddedBox, Solver, Volume | None]:
    """Return a padded grid, what solves on it, and the squared weight."""
    grid = padded_box(mask, geometry, around_mm=support_mm)
    inside, field = grid.embed_mask(mask), grid.embed(field_ppm)
    np.copyto(field, np.float32(0), where=~inside)
    solver = Solver(
        field,
        inside,
        grown(inside, grid.geometry, support_mm) if support_mm else inside,
        grid.geometry,
        alpha_ppm_mm,
        None if edges is None else _padded_edges(edges, grid, inside),
    )
    return grid, solver, None if weight is None else _squared_trust(grid.embed(weight), inside)


def _padded_edges(edges: NDArray[np.bool_], grid: PaddedBox, inside: Mask) -> NDArray[np.bool_]:
    """Return M on the padded grid: False across the boundary of the mask too, from either side."""
    return np.stack(
        [
            (grid.embed_mask(m) | ~inside) & (inside == np.roll(inside, -1, axis))
            for axis, m in enumerate(edges)
        ]
    )


def _difference(x: Volume, after: Volume, axis: int) -> Volume:
    """Return the forward difference of some planes, periodic; ``after`` is the next plane."""
    difference = np.empty_like(x)
    if axis == 0:
        np.subtract(x[1:], x[:-1], out=difference[:-1])
        np.subtract(after, x[-1], out=difference[-1])
    elif axis == 1:
        np.subtract(x[:, 1:], x[:, :-1], out=difference[:, :-1])
        np.subtract(x[:, 0], x[:, -1], out=difference[:, -1])
    else:
        np.subtract(x[..., 1:], x[..., :-1], out=difference[..., :-1])
        np.subtract(x[..., 0], x[..., -1], out=difference[..., -1])
    return difference


def _add_adjoint(b: Volume, q: Volume, axis: int) -> None:
    """Add the adjoint of the difference to some planes; the last one's along x is missing."""
    b -= q
    if axis == 0:
        b[1:] += q[:-1]
    elif axis == 1:
        b[:, 1:] += q[:, :-1]
        b[:, 0] += q[:, -1]
    else:
        b[..., 1:] += q[..., :-1]
        b[..., 0] += q[..., -1]


def _squared_trust(weight: Volume, inside: Mask) -> Volume:
    """Return W^2, where W is 0 outside the mask and 1 in the middle of what is trusted in it."""
    np.copyto(weight, np.float32(0), where=~inside)
    weight /= np.median(weight[weight > 0])
    np.minimum(weight, np.float32(MOST_TRUST), out=weight)
    weight *= weight
    return weight
