"""Blocks of one size at fixed places, for networks whose authors run them so.

A convolution pads at the rim of its block, so a whole volume would give another map than the one
that was published.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.bounding_box import Box
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Shape, Volume
from qsm_deploy.runtime.card.card import ModelCard, Tiles
from qsm_deploy.runtime.reconstruction.patches import Axis, PatchPlan, plan_whole


@dataclass(frozen=True)
class TilePlan(PatchPlan):
    """A grid of tiles over a volume; ``starts`` are those of what is kept of each."""

    tiles: Tiles

    def run(
        self,
        infer: Callable[[list[Volume]], Volume],
        volumes: list[Volume],
        mask: NDArray[np.bool_],
        done: Callable[[], object] = lambda: None,
    ) -> Volume:
        """Return the output of ``infer`` over all tiles; as :meth:`PatchPlan.run`.

        No tile is skipped: what a network makes of air is part of what the next one fades from.
        """
        if not mask.any():
            raise DataError("the mask is empty; nothing to reconstruct")
        margins = [
            (
                (size - kept) // 2,
                (size - kept) // 2 + axis.starts[-1] + kept - axis.length,
            )
            for axis, size, kept in zip(self.axes, self.tiles.size, self.tiles.kept, strict=True)
        ]
        mode = {"zero": "constant", "edge": "edge"}[self.tiles.beyond]
        padded = [np.pad(v, [(0, 0), *margins], mode=mode) for v in volumes]  # type: ignore[call-overload]
        size, kept = self.tiles.size, self.tiles.kept
        inside = tuple(slice(low, low + k) for (low, _), k in zip(margins, kept, strict=True))
        total: Volume | None = None
        faded: dict[Shape, Volume] = {}
        for start in self._starts():
            output = infer([np.ascontiguousarray(v[(..., *_box(start, size))]) for v in padded])
            if total is None:
                ends = [axis.starts[-1] + k for axis, k in zip(self.axes, kept, strict=True)]
                total = np.zeros((len(output), *ends), dtype=np.float32)
            tile = output[(slice(None), *inside)]
            if self.tiles.blend == "ramp":
                tile = tile.copy()  # else all of the output would be held
                self._fade(tile, start, faded)
                faded[start] = tile
            self._add(tile, start, total)
            done()
        assert total is not None  # there is a tile at 0
        return total[(slice(None), *(slice(0, axis.length) for axis in self.axes))]

    def _starts(self) -> Iterator[Shape]:
        """Yield where tiles begin, the first axis fastest."""
        for z, y, x in itertools.product(*(axis.starts for axis in reversed(self.axes))):
            yield x, y, z

    def _add(self, tile: Volume, start: Shape, total: Volume) -> None:
        """Put what is kept of a tile to those before it."""
        box = (slice(None), *_box(start, self.tiles.kept))
        if self.tiles.blend != "mean":
            total[box] = tile
            return
        x, y, z = (
            axis.windows[axis.starts.index(s)] for axis, s in zip(self.axes, start, strict=True)
        )
        total[box] += tile * (x[:, None, None] * y[:, None] * z)

    def _fade(self, tile: Volume, start: Shape, faded: dict[Shape, Volume]) -> None:
        """Let a tile come in over what it shares with those before it, in place.

        The last that needs one of these is the next along z, which takes it out.
        """
        for n, (kept, stride) in enumerate(zip(self.tiles.kept, self.tiles.stride, strict=True)):
            x, y, z = (s - stride * (n == axis) for axis, s in enumerate(start))
            before = faded.pop((x, y, z), None) if n == 2 else faded.get((x, y, z))
            if before is None:
                continue
            fresh, old = (np.moveaxis(v, n + 1, -1) for v in (tile, before))
            weight = np.linspace(1, 0, kept - stride, dtype=np.float32)
            fresh[..., : kept - stride] *= 1 - weight
            fresh[..., : kept - stride] += weight * old[..., stride:]


def plan_for(card: ModelCard, shape: tuple[int, ...]) -> PatchPlan:
    """Return the plan that makes of a volume what a network is meant to: whole, or in its tiles."""
    if card.tiles is None:
        return plan_whole(shape, card.divisor, card.pad_front)
    return plan_tiles(shape, card.tiles)


def plan_tiles(shape: tuple[int, ...], tiles: Tiles) -> TilePlan:
    """Return the tiles that cover a volume."""
    x, y, z = (
        _axis(n, size, kept, stride, flush=tiles.blend == "mean")
        for n, size, kept, stride in zip(shape, tiles.size, tiles.kept, tiles.stride, strict=True)
    )
    overlap = max(k - s for k, s in zip(tiles.kept, tiles.stride, strict=True))
    return TilePlan((x, y, z), whole=False, overlap=overlap, blend=tiles.blend, tiles=tiles)


def _axis(length: int, size: int, kept: int, stride: int, *, flush: bool) -> Axis:
    count = 1 + math.ceil(max(0, length - kept) / stride)
    starts = [stride * n for n in range(count)]
    if flush and length > kept:
        starts[-1] = length - kept
    padded = starts[-1] + kept
    covered = np.zeros(padded)
    for start in starts:
        covered[start : start + kept] += 1
    windows = np.stack([1 / covered[s : s + kept] for s in starts]).astype(np.float32)
    return Axis(length, padded, size, tuple(starts), windows)


def _box(start: Shape, size: Shape) -> Box:
    x, y, z = (slice(s, s + n) for s, n in zip(start, size, strict=True))
    return x, y, z
