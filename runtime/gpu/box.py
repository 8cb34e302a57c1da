"""The padded box of a mask in a GPU's memory, on which inversions work."""

from dataclasses import dataclass

from qsm_deploy.kernels.cuda_library import CudaLibrary, DipoleOperator, PatchBox
from qsm_deploy.kernels.geometry import Shape
from qsm_deploy.kernels.inversion.grid import PaddedBox


@dataclass(frozen=True)
class DeviceBox:
    """A padded box, all work on one stream.

    Attributes
    ----------
    library
        What does it.
    grid
        Where it lies in the scan's grid.
    mask, support
        Pointers to uint8 volumes on the padded grid: the mask, and where sources may lie.
    workspace, workspace_bytes
        Enough for the dipole.
    stream
        A ``cudaStream_t``.
    """

    library: CudaLibrary
    grid: PaddedBox
    mask: int
    support: int
    workspace: int
    workspace_bytes: int
    stream: int

    @property
    def shape(self) -> Shape:
        """Of the padded grid."""
        return self.grid.geometry.shape

    def load(self, volume: int, x: int) -> None:
        """Enqueue a copy of a volume on the scan's grid to the padded one; 0 outside the mask."""
        corner = [b.start - i.start for b, i in zip(self.grid.box, self.grid.inner, strict=True)]
        box = PatchBox(self.grid.shape, corner, self.shape)
        self.library.patch_gather(box, volume, x, self.stream)

    def store(self, x: int, between: int, volume: int) -> None:
        """Enqueue the way back, 0 outside the mask, by way of another padded volume."""
        self.masked(x, between)
        corner = [i.start - b.start for b, i in zip(self.grid.box, self.grid.inner, strict=True)]
        box = PatchBox(self.shape, corner, self.grid.shape)
        self.library.patch_gather(box, between, volume, self.stream)

    def masked(self, x: int, y: int) -> None:
        """Enqueue ``y``, which is ``x`` inside the mask."""
        self._inside(self.mask, x, y)

    def supported(self, x: int, y: int) -> None:
        """Enqueue ``y``, which is ``x`` where sources may lie."""
        self._inside(self.support, x, y)

    def apply(self, operator: DipoleOperator, x: int, y: int) -> None:
        """Enqueue a dipole operator of the padded grid; ``y`` may be ``x``."""
        self.library.dipole_apply(operator, x, y, self.workspace, self.workspace_bytes, self.stream)

    def _inside(self, mask: int, x: int, y: int) -> None:
        box = PatchBox(self.shape, (0, 0, 0), self.shape)
        self.library.patch_finish(box, x, y, mask=mask, stream=self.stream)
