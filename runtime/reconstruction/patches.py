"""Overlapped patches whose windows sum to one; the whole volume is the plan with one patch.

A plan works on the volume padded to the network's divisor as its published script does it: as a
rule with the larger half in front. Patch origins are multiples of the divisor, so that pooling
grids line up with the whole volume's and a patch whose halo covers the receptive field is exact.
Patches have one size and lie on a grid, so windows are products of one-dimensional ones,
normalised along each axis: they sum to one at every voxel, and nothing is divided afterwards.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.bounding_box import Box, bounding_box
from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import PadFront, TileBlend

Blend = Literal["hann", "gaussian", "crop"]


@dataclass(frozen=True)
class Axis:
    """The patches along one axis: where they start, in volume voxels, and their windows.

    ``length`` and ``padded`` are the volume's voxels, without and with padding to the divisor.
    ``starts`` may be negative and patches may end beyond the volume: zeros lie there.
    ``windows`` is a (patches, size) array whose columns at the same voxel sum to one.
    """

    length: int
    padded: int
    size: int
    starts: tuple[int, ...]
    windows: Volume


@dataclass(frozen=True)
class Patch:
    """One patch: its box in volume voxels (possibly beyond the volume) and its three windows.

    ``index`` counts the patches along each axis.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    windows: tuple[Volume, ...]
    shape: tuple[int, ...]
    index: tuple[int, ...]

    @property
    def inside(self) -> Box:
        """The part of the volume that the patch covers."""
        x, y, z = (
            slice(max(0, s), min(s + p, n))
            for s, p, n in zip(self.start, self.size, self.shape, strict=True)
        )
        return x, y, z

    @property
    def own(self) -> Box:
        """The part of the patch that lies on the volume."""
        x, y, z = (
            slice(part.start - s, part.stop - s)
            for part, s in zip(self.inside, self.start, strict=True)
        )
        return x, y, z

    def gather(self, volume: Volume, patch: Volume | None = None) -> Volume:
        """Return the patch of a (..., x, y, z) volume, zero where it lies beyond.

        It is written into ``patch``, if there is one.
        """
        if patch is None:
            patch = np.empty((*volume.shape[:-3], *self.size), dtype=np.float32)
        patch[...] = 0
        patch[(..., *self.own)] = volume[(..., *self.inside)]
        return patch

    def accumulate(self, patch: Volume, total: Volume) -> None:
        """Add the windowed patch to the volume it was gathered from, in place."""
        x, y, z = (window[part] for window, part in zip(self.windows, self.own, strict=True))
        weighted = patch[(..., *self.own)] * (x[:, None, None] * y[:, None])
        weighted *= z
        total[(..., *self.inside)] += weighted


@dataclass(frozen=True)
class PatchPlan:
    """A grid of patches over a volume."""

    axes: tuple[Axis, Axis, Axis]
    whole: bool
    overlap: int
    blend: Blend | TileBlend

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """The size of every patch."""
        x, y, z = self.axes
        return x.size, y.size, z.size

    @property
    def count(self) -> int:
        """The number of patches, empty ones included."""
        return math.prod(len(axis.starts) for axis in self.axes)

    def __iter__(self) -> Iterator[Patch]:
        grid = itertools.product(*(range(len(axis.starts)) for axis in self.axes))
        for index in grid:
            at = list(zip(self.axes, index, strict=True))
            yield Patch(
                tuple(axis.starts[i] for axis, i in at),
                self.patch_shape,
                tuple(axis.windows[i] for axis, i in at),
                tuple(axis.length for axis in self.axes),
                index,
            )

    def run(
        self,
        infer: Callable[[list[Volume]], Volume],
        volumes: list[Volume],
        mask: NDArray[np.bool_],
        done: Callable[[], object] = lambda: None,
    ) -> Volume:
        """Return the blended output of ``infer`` over all patches that touch the mask.

        Parameters
        ----------
        infer
            Maps patches of ``volumes`` to a (c, x, y, z) patch of the output.
        volumes
            (c, x, y, z) inputs of the network.
        mask
            (x, y, z), True inside, not empty; patches without a voxel of it are skipped.
        done
            Called after each patch.

        Returns
        -------
        (c, x, y, z) array
        """
        total: Volume | None = None
        # of all patches, since a backend keeps what it was handed last
        inputs = [np.empty((*v.shape[:-3], *self.patch_shape), np.float32) for v in volumes]
        for patch in self:
            if mask[patch.inside].any():
                output = infer([patch.gather(v, i) for v, i in zip(volumes, inputs, strict=True)])
                if total is None:
                    total = np.zeros((*output.shape[:-3], *mask.shape), dtype=np.float32)
                patch.accumulate(output, total)
                del output  # before the next one
            done()
        if total is None:
            raise DataError("the mask is empty; nothing to reconstruct")
        return total


def plan_whole(shape: tuple[int, ...], divisor: int, front: PadFront = "ceil") -> PatchPlan:
    """Return the plan that runs the whole volume, padded to the divisor, at once."""
    x, y, z = (_axis(n, divisor, front, (0, n), None, 0, "crop") for n in shape)
    return PatchPlan((x, y, z), whole=True, overlap=0, blend="crop")


def plan_patches(
    mask: NDArray[np.bool_],
    divisor: int,
    patch: int,
    overlap: int,
    blend: Blend,
    front: PadFront = "ceil",
) -> PatchPlan:
    """Return a plan of overlapped patches over the mask's bounding box.

    Parameters
    ----------
    mask
        (x, y, z), True inside, not empty. The box is grown by half the overlap.
    divisor
        The network's; patch sizes and origins are multiples of it.
    patch
        Edge length [voxels]; shorter where the box is.
    overlap
        Voxels that neighbours share at least.
    blend
        ``crop`` takes each voxel from the patch it lies deepest in, at least ``overlap / 2``;
        ``hann`` and ``gaussian`` fade from one patch to the next.
    front
        How much of the padding to the divisor lies in front.

    Raises
    ------
    UsageError
        If the patch is not a multiple of the divisor, or not larger than the overlap.
    DataError
        If the mask is empty.
    """
    if patch % divisor or patch <= 0:
        raise UsageError(f"--patch {patch} is not a multiple of the network's divisor {divisor}")
    if not 0 <= overlap <= patch - divisor:
        raise UsageError(
            f"--overlap {overlap} must lie between 0 and patch - divisor = {patch - divisor}; "
            "pass a larger --patch or a smaller --overlap"
        )
    box = bounding_box(mask, margin=math.ceil(overlap / 2))
    x, y, z = (
        _axis(n, divisor, front, (side.start, side.stop), patch, overlap, blend)
        for n, side in zip(mask.shape, box, strict=True)
    )
    return PatchPlan((x, y, z), whole=False, overlap=overlap, blend=blend)


def _axis(
    length: int,
    divisor: int,
    front: PadFront,
    box: tuple[int, int],
    patch: int | None,
    overlap: int,
    blend: Blend,
) -> Axis:
    """Cover ``box`` of an axis with evenly spread patches on the divisor's grid."""
    padded = divisor * math.ceil(length / divisor)
    missing = padded - length
    low = {"ceil": math.ceil(missing / 2), "floor": missing // 2, "none": 0}[front]
    first = (box[0] + low) // divisor * divisor
    extent = divisor * math.ceil((box[1] + low - first) / divisor)
    size = extent if patch is None else min(patch, extent)
    stride = (size - overlap) // divisor * divisor
    gaps = 0 if size == extent else math.ceil((extent - size) / stride)
    steps = [(extent - size) * i // (gaps or 1) // divisor * divisor for i in range(gaps + 1)]
    starts = np.array(steps)
    profiles = np.zeros((len(starts), extent), dtype=np.float64)
    for n, start in enumerate(starts):
        profiles[n, start : start + size] = _profile(
            size, blend, overlap, first_patch=n == 0, last_patch=n == gaps
        )
    if blend == "crop":
        profiles = (np.arange(len(starts))[:, None] == profiles.argmax(axis=0)).astype(np.float64)
    profiles /= profiles.sum(axis=0)
    windows = np.stack([p[s : s + size] for p, s in zip(profiles, starts, strict=True)])
    return Axis(
        length,
        padded,
        size,
        tuple(int(s) + first - low for s in starts),
        windows.astype(np.float32),
    )


def _profile(
    size: int, blend: Blend, overlap: int, *, first_patch: bool, last_patch: bool
) -> NDArray[np.float64]:
    """Return a patch's weight before normalisation, positive, falling towards its neighbours."""
    position = np.arange(size) + 0.5
    if blend == "gaussian":
        weight: NDArray[np.float64] = np.exp(-0.5 * ((position - size / 2) / (size / 8)) ** 2)
        return weight
    depth = np.full(size, float(size))
    if not first_patch:
        depth = np.minimum(depth, position)
    if not last_patch:
        depth = np.minimum(depth, size - position)
    if blend == "crop":
        return depth
    ramp: NDArray[np.float64] = np.sin(np.pi / 2 * np.clip(depth / max(overlap, 1), 0, 1)) ** 2
    return ramp
