"""What the export asks of every network, and what a user chooses about one."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from qsm_deploy.kernels.ends import RAS
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import (
    Anchor,
    GeometryLimits,
    PadFront,
    Pipeline,
    PriorMap,
    TensorInfo,
    Tiles,
)

VOLUME = ("n", 1, "x", "y", "z")
LOCAL_FIELD = TensorInfo("local_field_ppm", "ppm", VOLUME)
TOTAL_FIELD = TensorInfo("total_field_ppm", "ppm", VOLUME)
R2_PRIME = TensorInfo("r2prime_hz", "Hz", VOLUME)
MASK = TensorInfo("mask", "1", VOLUME)
PHASE = TensorInfo("phase_rad", "rad", VOLUME)
VOXEL_SIZE = TensorInfo("voxel_size_mm", "mm", (3,))
ECHO_TIME = TensorInfo("echo_time_s", "s", (1,))
FIELD_NOISE = TensorInfo("field_noise_ppm", "ppm", (1,))
FIELD_STRENGTH = TensorInfo("field_strength_t", "T", (1,))
CHI = TensorInfo("chi_ppm", "ppm", VOLUME)
CHI_POSITIVE = TensorInfo("chi_positive_ppm", "ppm", VOLUME)
CHI_NEGATIVE = TensorInfo("chi_negative_ppm", "ppm", VOLUME)

ANY_GEOMETRY = GeometryLimits(None, None, None, None)
AXIAL_1MM = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 2.0)


@dataclass(frozen=True)
class Choices:
    """What the weights do not say about a network.

    Attributes
    ----------
    options
        A value for each of the network's options.
    normalisation
        Arrays by the names in the authors' files; empty if none were passed.
    b0_direction
        Unit vector in voxel axes, for networks that are folded for one direction.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    normalisation: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    b0_direction: tuple[float, float, float] | None = None


class Network(nn.Module):
    """Volumes (n, c, x, y, z), and numbers that hold for all of them, to one volume or several.

    Attributes
    ----------
    inputs, output
        What ``forward`` takes, in order, and returns; a tuple with ``further_outputs``.
    further_outputs
        What it returns after the first.
    pipeline
        What the runtime does besides running the graph.
    geometry
        The grids it was trained for.
    why_whole
        Why it cannot be run in patches, or ``None`` if it can.
    priors
        Maps of the whole volume that the runtime makes for inputs of their names.
    anchor
        What the map keeps of one of these.
    axes
        The ends that x, y and z of the training's arrays run to.
    reach
        How far an output voxel sees at most [voxels], where that is known before it is measured.
    only_tiles
        Whether it computes at the size of its tiles and no other.
    pad_front
        How much of the padding to the divisor lies in front.
    tiles
        The blocks that it is run on, of a network that its authors run so.
    normalisation, constants
        Numbers of the method for the card, by name.
    """

    inputs: tuple[TensorInfo, ...] = (LOCAL_FIELD,)
    output: TensorInfo = CHI
    further_outputs: tuple[TensorInfo, ...] = ()
    pipeline: Pipeline = "cnn"
    geometry: GeometryLimits = AXIAL_1MM
    why_whole: str | None = None
    priors: tuple[PriorMap, ...] = ()
    anchor: Anchor | None = None
    axes: str = RAS
    reach: int | None = None
    only_tiles: bool = False
    pad_front: PadFront = "ceil"
    tiles: Tiles | None = None
    normalisation: Mapping[str, float] = {}
    constants: Mapping[str, float] = {}

    @property
    @abstractmethod
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""


def outputs_of(network: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return all that a network gives, also if that is one."""
    given = network(*tensors)
    return given if isinstance(given, tuple) else (given,)


def require_network(module: object, name: str) -> Network:
    """Return what a network's file built, if the export can ask of it what it must know.

    Parameters
    ----------
    module
        What ``network_from_state`` returned.
    name
        The network's.

    Raises
    ------
    UsageError
        If it lacks something; the message names what.
    """
    kind = type(module).__name__
    if not isinstance(module, Network):
        raise UsageError(
            f"{kind}, which was built for {name}, is no Network; derive it from "
            "qsm_deploy.export.networks.network.Network"
        )
    divisor: object = module.divisor  # torch's modules do not enforce what is abstract
    if not isinstance(divisor, int) or divisor < 1:
        raise UsageError(
            f"{kind}, the network of {name}, says no divisor; define it as the positive whole "
            "number that every spatial size must be a multiple of"
        )
    return module
