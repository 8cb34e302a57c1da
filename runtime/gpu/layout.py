"""Where everything lies in a GPU's memory, known before any of it is allocated.

What lives through a whole reconstruction comes first: the engine, the volumes, the sum of patches
and the map. One scratch buffer after that serves the stages in turn.
"""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from qsm_deploy.kernels.cuda_abi import DOT_WORKSPACE_BYTES
from qsm_deploy.kernels.cuda_library import CudaLibrary, DipoleOperator, MultiplierName
from qsm_deploy.kernels.errors import CardError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.kernels.inversion.grid import PaddedBox, padded_box
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.device import ALIGNMENT
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession, Shapes
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.memory import PAD_VOXELS
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import input_shapes, network_input
from qsm_deploy.runtime.reconstruction.prior_maps import variation_steps
from qsm_deploy.runtime.scan.scan import Scan

FIELD, SIGNED = "local_field_ppm", "signed field"
FLOAT, DOUBLE = 4, 8
NUMBERS = 3  # dot products that are needed at the same time
WORKERS = 2  # patches in flight, each on a stream of its own
# of total variation on the padded box; the first four are enough for TKD
VOLUMES, DUALS = ("field", "x", "q2", "b", "s3"), ("s1", "s1_next")
Pad = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Buffers by name, one after the other [bytes]."""

    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(map(whole_units, self.sizes.values()))

    def at(self, base: int) -> dict[str, int]:
        """Return the pointers of the buffers in one at ``base``."""
        pointers, offset = {}, base
        for name, size in self.sizes.items():
            pointers[name] = offset
            offset += whole_units(size)
        return pointers


class DeviceWork(ABC):
    """What decides the memory of a reconstruction on a GPU besides its patch plan.

    Attributes
    ----------
    scan
        The acquisition.
    library
        The operators on the GPU.
    evaluates
        Whether the field residual is computed.
    field
        The field where it lies on the GPU already; that of the scan is not read then.
    """

    scan: Scan
    library: CudaLibrary
    evaluates: bool
    field: DeviceView | None

    @abstractmethod
    def lasting(self, plan: PatchPlan) -> Layout:
        """Return what lives through the whole reconstruction."""

    @abstractmethod
    def stages(self, plan: PatchPlan) -> dict[str, Layout]:
        """Return what each stage needs for itself, in their order."""

    @abstractmethod
    def advice(self, free: str) -> str:
        """Return what to do where so little memory is free."""

    @property
    def voxels(self) -> int:
        """Of the volume."""
        return math.prod(self.scan.geometry.shape)

    @functools.cached_property
    def grid(self) -> PaddedBox:
        """The padded box of the mask."""
        return padded_box(self.scan.mask, self.scan.geometry)

    def variation(self) -> Layout:
        """Return what total variation needs."""
        volumes = dict.fromkeys(VOLUMES, 1) | dict.fromkeys(DUALS, 3)
        return self.boxed(self.library.tv_workspace_bytes(self.grid.geometry), **volumes)

    def anchored(self) -> Layout:
        """Return what it takes to keep some of a prior map."""
        workspace = self.library.dipole_workspace_bytes(DipoleOperator(self.grid.geometry))
        return self.boxed(workspace, x=1, prior=1, between=1)

    def boxed(self, workspace_bytes: int, **volumes: int) -> Layout:
        """Return what volumes on the padded box need, by their components, with its masks."""
        voxels = math.prod(self.grid.geometry.shape)
        sizes = {name: n * FLOAT * voxels for name, n in volumes.items()}
        return Layout(sizes | {"mask": voxels, "support": voxels, "workspace": workspace_bytes})

    @property
    def map_bytes(self) -> int:
        """Of the map, which may outlive everything else."""
        return whole_units(FLOAT * self.voxels)

    def allocated_bytes(self, plan: PatchPlan) -> dict[str, int]:
        """Return what is allocated for every stage [bytes]."""
        held = self.lasting(plan).total + self.map_bytes
        return {name: held + stage.total for name, stage in self.stages(plan).items()}

    def residual(self) -> Layout:
        """Return what the field residual needs."""
        more = {"predicted": FLOAT * self.voxels}
        return Layout(self.transform(twice(self.scan.geometry), "dipole").sizes | more)

    def transform(self, pad: Pad, multiplier: MultiplierName) -> Layout:
        """Return what the operator needs on the grid with zeros on both sides of each axis."""
        grid = self.scan.geometry.padded(pad)
        voxels = math.prod(grid.shape)
        workspace = self.library.dipole_workspace_bytes(DipoleOperator(grid, multiplier))
        return Layout({"padded": FLOAT * voxels, "padded mask": voxels, "workspace": workspace})


@dataclass(frozen=True)
class DeviceWorkload(DeviceWork):
    """What decides the memory of a reconstruction with a network besides its patch plan.

    Attributes
    ----------
    scan
        The acquisition.
    session, library
        The engine, and the operators around it.
    correction
        The data-consistency step, if there is one.
    evaluates
        Whether the field residual is computed.
    field
        The field where it lies on the GPU already; that of the scan is not read then.
    """

    scan: Scan
    session: DeviceSession
    library: CudaLibrary
    correction: Correction | None
    evaluates: bool
    field: DeviceView | None = None

    @property
    def card(self) -> ModelCard:
        """The network's."""
        return self.session.card

    def peak_bytes(self, plan: PatchPlan) -> dict[str, float]:
        """Return the memory of every stage on the GPU, with the engine's own [bytes]."""
        own = {"inference": own_bytes(self.session, self.shapes(plan))}
        return {
            name: float(self.session.weights_bytes + allocated + own.get(name, 0))
            for name, allocated in self.allocated_bytes(plan).items()
        }

    def advice(self, free: str) -> str:
        """Return what to do where so little memory is free."""
        return f"pass --memory-limit {free} or smaller patches"

    def lasting(self, plan: PatchPlan) -> Layout:
        """Return what lives through the whole reconstruction."""
        each = {prior.name: 1 for prior in self.card.priors} | self.channels
        volumes = {name: FLOAT * n * self.voxels for name, n in each.items()}
        own = {"total": FLOAT * self.voxels, "inside": self.voxels}
        own |= {f"windows {n}": axis.windows.nbytes for n, axis in enumerate(plan.axes)}
        own |= {"sums": NUMBERS * DOUBLE, "dot": DOT_WORKSPACE_BYTES}
        if self.signs_field:
            own[SIGNED] = volumes[FIELD]
        numbers = {name: values.nbytes for name, values in self.numbers.items()}
        if taken := volumes.keys() & {*own, "chi"}:
            raise CardError(f"the name {min(taken)} of a prior map is taken on a GPU; rename it")
        return Layout(volumes | numbers | own)

    def stages(self, plan: PatchPlan) -> dict[str, Layout]:
        """Return what each stage needs for itself, in their order."""
        stages = {}
        if self.card.priors:
            stages["prepare"] = self.priors()
        stages["inference"] = self._inference(plan)
        if self.card.anchor is not None:
            stages["anchor"] = self.anchored()
        if self.compares:
            stages["field residual"] = self.residual()
        if self.correction is not None:
            stages["data consistency"] = self.consistency(self.correction)
        return stages

    @property
    def channels(self) -> dict[str, int]:
        """Of every volume that the network takes."""
        return {t.name: int(t.shape[1]) for t in self.card.inputs if t.is_volume}

    @functools.cached_property
    def numbers(self) -> dict[str, Volume]:
        """What the network takes besides volumes."""
        names = (t.name for t in self.card.inputs if not t.is_volume)
        return {name: network_input(self.card, self.scan, name) for name in names}

    @property
    def field_sign(self) -> float:
        """What the network wants its field multiplied with."""
        return self.card.constants.get("field_sign", 1)

    @property
    def signs_field(self) -> bool:
        """Whether what the network takes is not the field that the others take."""
        return FIELD in self.channels and self.field_sign != 1

    @property
    def compares(self) -> bool:
        """Whether the map is compared with its field."""
        return self.evaluates or self.correction is not None

    def shapes(self, plan: PatchPlan) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what the engine takes: a patch of each volume, and the numbers."""
        return input_shapes(self.card, self.scan, plan)

    def priors(self) -> Layout:
        """Return what making prior maps needs."""
        if variation_steps(self.card.priors):
            return self.variation()
        workspace = self.library.dipole_workspace_bytes(DipoleOperator(self.grid.geometry))
        return self.boxed(workspace, **dict.fromkeys(VOLUMES[:4], 1))

    def consistency(self, correction: Correction) -> Layout:
        """Return what the data-consistency step needs."""
        if correction.iterations is None:
            image = {"image": FLOAT * self.voxels}
            return Layout(self.transform((PAD_VOXELS,) * 3, "dipole").sizes | image)
        workspace = self.library.dipole_workspace_bytes(DipoleOperator(self.grid.geometry))
        return self.boxed(workspace, x=1, residual=1, direction=1, image=1, between=1)

    def _inference(self, plan: PatchPlan) -> Layout:
        shapes = self.shapes(plan)
        patch = {name: FLOAT * math.prod(shapes[name]) for name in self.channels}
        patch["output"] = FLOAT * math.prod(self.session.output_shape(shapes))
        patch["scratch"] = self.session.scratch_bytes(shapes)
        workers = range(min(WORKERS, plan.count))
        return Layout({f"{name} {n}": size for n in workers for name, size in patch.items()})


def own_bytes(session: DeviceSession, shapes: Shapes) -> int:
    """Return what the engine's library takes for itself.

    Raises
    ------
    CardError
        If nobody measured it.
    """
    own = session.own_bytes(shapes)
    if own is None:
        raise CardError("the model's card has no memory measurements; export the model again")
    return own


def twice(geometry: Geometry) -> Pad:
    """Return the padding to twice the size, as the field residual takes it."""
    x, y, z = ((n + 1) // 2 for n in geometry.shape)
    return x, y, z


def whole_units(size: int) -> int:
    """Return a size rounded up to the alignment of buffers."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
