"""The dipole operator on a padded grid in a GPU's memory, and what data consistency makes of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from qsm_deploy.kernels.cuda_library import (
    CudaLibrary,
    DipoleOperator,
    MultiplierName,
    PatchBox,
    Ratio,
)
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.gpu.box import DeviceBox

DOUBLE = 8
Pad = tuple[int, int, int]


@dataclass(frozen=True)
class PaddedDipole:
    """``y = M crop(F^-1 [E F pad(x)])``, all on one stream.

    Attributes
    ----------
    library
        What does it.
    geometry
        Of the volumes, without padding.
    pad
        Zeros on both sides of each axis.
    buffers
        Pointers to ``padded``, ``padded mask`` and ``workspace``.
    workspace_bytes
        Of the workspace.
    stream
        A ``cudaStream_t``.
    """

    library: CudaLibrary
    geometry: Geometry
    pad: Pad
    buffers: Mapping[str, int]
    workspace_bytes: int
    stream: int

    def load(self, x: int) -> None:
        """Pad a volume into the buffer."""
        start = tuple(-p for p in self.pad)
        box = PatchBox(self.geometry.shape, start, self._grid.shape)
        self.library.patch_gather(box, x, self.buffers["padded"], self.stream)

    def apply(self, operator: DipoleOperator) -> None:
        """Apply the operator to what the buffer holds; of its geometry nothing is read."""
        padded, workspace = self.buffers["padded"], self.buffers["workspace"]
        self.library.dipole_apply(
            replace(operator, geometry=self._grid),
            padded,
            padded,
            workspace,
            self.workspace_bytes,
            self.stream,
        )

    def store(self, y: int, *, masked: bool) -> None:
        """Crop the buffer into a volume, 0 outside the mask if it is to be masked."""
        box = PatchBox(self._grid.shape, self.pad, self.geometry.shape)
        mask = self.buffers["padded mask"] if masked else 0
        self.library.patch_finish(box, self.buffers["padded"], y, mask=mask, stream=self.stream)

    def field_of(self, x: int, y: int) -> None:
        """Enqueue the masked field of a map; ``y`` may be ``x``."""
        self.filtered(x, y, "dipole", masked=True)

    def filtered(
        self,
        x: int,
        y: int,
        multiplier: MultiplierName,
        *,
        masked: bool,
        threshold: float = 0.12,
        lam: float = 0.01,
    ) -> None:
        """Enqueue one multiplier; ``y`` may be ``x``."""
        self.load(x)
        self.apply(DipoleOperator(self._grid, multiplier, threshold=threshold, lam=lam))
        self.store(y, masked=masked)

    @property
    def _grid(self) -> Geometry:
        return self.geometry.padded(self.pad)


@dataclass(frozen=True)
class DeviceVectors:
    """Sums and products of volumes on the GPU, all on one stream.

    ``sums`` points to float64 numbers, ``dot`` to the workspace of sums.
    """

    library: CudaLibrary
    count: int
    sums: int
    dot: int
    stream: int

    def number(self, index: int) -> int:
        """Return the pointer to one of the numbers."""
        return self.sums + DOUBLE * index

    def product(self, x: int, y: int, index: int) -> None:
        """Enqueue the dot product of two volumes into a number."""
        self.library.dot(self.count, x, y, self.number(index), self.dot, self.stream)

    def count_beyond(self, x: int, limit: float, index: int) -> None:
        """Enqueue the number of voxels beyond +-limit into a number."""
        self.library.count_beyond(self.count, x, limit, self.number(index), self.dot, self.stream)

    def combine(self, a: float | Ratio, x: int, b: float | Ratio, y: int) -> None:
        """Enqueue ``y = a x + b y``."""
        self.library.combine(self.count, a, x, b, y, self.stream)


def closed_form(
    chi: int, field: int, lam: float, dipole: PaddedDipole, vectors: DeviceVectors, image: int
) -> None:
    """Enqueue the closed data-consistency step on a masked map, in place.

    The CPU's is :func:`qsm_deploy.kernels.data_consistency.data_consistency`.
    """
    dipole.filtered(chi, chi, "tikhonov_prior", masked=True, lam=lam)
    dipole.filtered(field, image, "tikhonov", masked=True, lam=lam)
    vectors.combine(1, image, 1, chi)


def conjugate_gradients(
    normal: Callable[[int, int], None],
    iterations: int,
    vectors: DeviceVectors,
    at: Mapping[str, int],
) -> Iterator[None]:
    """Enqueue steps, and yield after each.

    The CPU's is :func:`qsm_deploy.kernels.inversion.least_squares.conjugate_gradients`, which stops
    when the residual is within rounding; here the steps that are left are taken too, since stopping
    would mean waiting for the GPU.

    Parameters
    ----------
    normal
        Enqueues the operator, from a pointer to another.
    iterations
        Number of steps.
    vectors
        With three numbers.
    at
        The solution ``x`` so far, its ``residual``, the same again as the first ``direction``, and
        room for an ``image``.
    """
    x, r, direction, image = (at[name] for name in ("x", "residual", "direction", "image"))
    now, before, curvature = 0, 1, 2
    vectors.product(r, r, now)
    for _ in range(iterations):
        normal(direction, image)
        vectors.product(direction, image, curvature)
        length = (vectors.number(now), vectors.number(curvature))
        vectors.combine(Ratio(*length), direction, 1, x)
        vectors.combine(Ratio(*length, factor=-1), image, 1, r)
        now, before = before, now
        vectors.product(r, r, now)
        vectors.combine(1, r, Ratio(vectors.number(now), vectors.number(before)), direction)
        yield


def iterative_form(
    chi: int,
    field: int,
    lam: float,
    iterations: int,
    box: DeviceBox,
    vectors: DeviceVectors,
    at: Mapping[str, int],
) -> None:
    """Enqueue the iterative data-consistency step on a masked map, in place.

    The first two numbers are then the squared norms of what its field misses, with the sources
    outside the mask, and of the field.

    The CPU's is :func:`qsm_deploy.kernels.data_consistency.masked_data_consistency`.

    Parameters
    ----------
    chi, field
        Pointers to the map of the network and the field, 0 outside the mask [ppm].
    lam, iterations
        Weight of the map, and number of steps.
    box
        The padded box.
    vectors
        Of its volumes, with three numbers.
    at
        Its buffers ``x``, ``residual``, ``direction``, ``image`` and ``between``.
    """
    x, r, direction, image = (at[name] for name in ("x", "residual", "direction", "image"))
    dipole, between = DipoleOperator(box.grid.geometry), at["between"]

    def field_of(x: int) -> None:
        box.apply(dipole, x, between)
        box.masked(between, image)

    def adjoint(to: int) -> None:
        box.apply(dipole, image, between)
        box.supported(between, to)

    def normal(x: int, to: int) -> None:
        field_of(x)
        adjoint(to)
        box.masked(x, between)
        vectors.combine(lam, between, 1, to)

    box.load(chi, x)
    box.load(field, r)
    field_of(x)
    vectors.combine(1, r, -1, image)
    adjoint(r)
    box.supported(between, direction)
    for _ in conjugate_gradients(normal, iterations, vectors, at):
        pass
    box.load(field, r)
    field_of(x)
    vectors.combine(-1, r, 1, image)
    vectors.product(image, image, 0)
    vectors.product(r, r, 1)
    box.store(x, between, chi)
