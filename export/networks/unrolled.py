"""The two forms of an unrolled network: one graph for everything, or the learned prior alone.

An unrolled network alternates a learned prior with steps in the Fourier domain. Those need the
whole volume; the prior does not. So the graph either holds both and runs on whole volumes only,
or it holds the prior, which runs in patches, and the runtime does the rest.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from qsm_deploy.export.networks.network import MASK, VOXEL_SIZE, Network
from qsm_deploy.runtime.card.card import GeometryLimits, Pipeline, TensorInfo


class Unrolled(Network):
    """Local fields, mask, voxel size and B0 directions to susceptibility, in one graph.

    Parameters
    ----------
    orientations
        Number of fields, registered to each other, each with a B0 direction of its own.
    """

    why_whole = "its Fourier steps need the whole volume"

    def __init__(self, orientations: int = 1) -> None:
        super().__init__()
        self.orientations = orientations
        self.inputs = (
            TensorInfo("local_field_ppm", "ppm", ("n", orientations, "x", "y", "z")),
            MASK,
            VOXEL_SIZE,
            TensorInfo("b0_direction", "1", (orientations, 3)),
        )

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return 1


class Prior(Network):
    """The learned part alone; what it takes and returns is normalised.

    Parameters
    ----------
    gen
        Maps (n, c, x, y, z) to the same shape.
    channels
        The c of that shape.
    pipeline
        The runtime's loop around it.
    geometry
        The grids it was trained for.
    normalisation, constants
        Numbers of that loop, for the card.
    """

    def __init__(
        self,
        gen: nn.Sequential,
        channels: int,
        pipeline: Pipeline,
        geometry: GeometryLimits,
        normalisation: Mapping[str, float],
        constants: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.gen = gen
        shape = ("n", channels, "x", "y", "z")
        self.inputs = (TensorInfo("prior_input", "1", shape),)
        self.output = TensorInfo("prior_output", "1", shape)
        self.pipeline = pipeline
        self.geometry = geometry
        self.normalisation = dict(normalisation)
        self.constants = dict(constants)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return 1

    def forward(self, prior_input: Tensor) -> Tensor:
        """Return ``prior_output``."""
        y: Tensor = self.gen(prior_input)
        return y
