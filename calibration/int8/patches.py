"""What a network takes in the middle of heads: patches of its real inputs with their masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.bounding_box import Corner, box_at, corner_around
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Shape
from qsm_deploy.runtime.card.card import UNROLLED, ModelCard
from qsm_deploy.runtime.console.terminal import Progress, no_progress
from qsm_deploy.runtime.reconstruction.pipeline import network_inputs, network_outputs
from qsm_deploy.runtime.reconstruction.tiles import plan_for
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Precision, Session

SIZE = 64
RIM = 8  # voxels at a cut, where zeros stand for what was cut off
Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class CalibrationPatch:
    """What a network takes of one box.

    Attributes
    ----------
    tensors
        (1, c, x, y, z) volumes, and numbers as they are, by input name.
    mask
        (x, y, z) bool: in the head, and not next to a cut.
    """

    tensors: Tensors
    mask: NDArray[np.bool_]


def sample_patches(
    card: ModelCard,
    scans: Sequence[Scan],
    open_session: Callable[[], Session],
    *,
    count: int,
    seed: int,
    size: int = SIZE,
    progress: Progress = no_progress,
) -> list[CalibrationPatch]:
    """Return patches at random places in the masks, as many of one acquisition as of another.

    A network that may be patched, or runs in tiles, is given parts of the whole volume's inputs,
    of the size of its tiles if it has any. The prior of an
    unrolled one is given what it takes in the course of the reconstruction of the whole volume,
    at every iteration. Any other network is given the inputs of a box that was cut out before.

    Parameters
    ----------
    card
        Of the network.
    scans
        Acquisitions that it may be used on.
    open_session
        Opens the network in FP32; called only if it has to run.
    count
        Patches, at least one of each acquisition.
    seed
        Decides the places.
    size
        Edge length without tiles, made a multiple of the network's divisor.
    progress
        Shows how far it is.
    """
    rng = np.random.default_rng(seed)
    edge, d = max(1, round(size / card.divisor)) * card.divisor, card.divisor
    shape, multiple = (edge, edge, edge), (d, d, d)
    if card.tiles is not None:
        shape = multiple = card.tiles.size
    shares = [len(part) for part in np.array_split(np.arange(max(count, len(scans))), len(scans))]
    session = open_session() if card.pipeline in UNROLLED else None
    found: list[CalibrationPatch] = []
    for scan, share in progress(list(zip(scans, shares, strict=True)), "taking patches"):
        corners = _corners(scan.mask, share, shape, card.divisor, rng)
        if session is not None:
            recorder = _Recorder(session, scan.mask, corners, shape)
            network_outputs(recorder, scan, plan_for(card, scan.mask.shape))
            found += recorder.patches
        elif card.patchable == "yes" or card.tiles is not None:
            inputs = network_inputs(card, scan)
            found += [_cut(inputs, scan.mask, corner, shape, multiple) for corner in corners]
        else:
            found += [_own_inputs(card, scan, corner, shape, multiple) for corner in corners]
    if not any(patch.mask.any() for patch in found):
        raise DataError(
            "no calibration patch holds a voxel of a mask that is not next to its edge; "
            "pass larger maps"
        )
    return found


class _Recorder:
    """A session that keeps parts of what it is given, at one place after the other."""

    precision: Precision = "fp32"

    def __init__(
        self,
        session: Session,
        mask: NDArray[np.bool_],
        corners: Sequence[Corner],
        shape: Shape,
    ) -> None:
        self.card, self.backend, self.version = session.card, session.backend, session.version
        self.patches: list[CalibrationPatch] = []
        self._session, self._mask, self._corners, self._shape = session, mask, corners, shape
        self._iterations = max(1, int(session.card.constants.get("iterations", 1)))
        self._calls = 0

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the network; keep this iteration's share of the patches."""
        inputs = {name: value[0] for name, value in tensors.items()}
        for corner in self._corners[self._calls % self._iterations :: self._iterations]:
            self.patches.append(_cut(inputs, self._mask, corner, self._shape, (1, 1, 1)))
        self._calls += 1
        return self._session.run(tensors)


def _corners(
    mask: NDArray[np.bool_], count: int, shape: Shape, divisor: int, rng: np.random.Generator
) -> list[Corner]:
    inside = np.flatnonzero(mask)
    chosen = rng.choice(inside, count)
    found = []
    for x, y, z in zip(*np.unravel_index(chosen, mask.shape), strict=True):
        centre = int(x), int(y), int(z)
        found.append(corner_around(centre, shape, mask.shape, divisor=divisor))
    return found


def _cut(
    inputs: Mapping[str, NDArray[np.float32]],
    mask: NDArray[np.bool_],
    corner: Corner,
    shape: Shape,
    multiple: Shape,
) -> CalibrationPatch:
    def box(volume: NDArray[Any]) -> NDArray[Any]:
        part = volume[(..., *box_at(corner, shape))]
        ends = [(0, -n % m) for n, m in zip(part.shape[-3:], multiple, strict=True)]
        return np.ascontiguousarray(np.pad(part, [(0, 0)] * (part.ndim - 3) + ends))

    tensors = {
        name: box(value)[None] if value.ndim == 4 else value for name, value in inputs.items()
    }
    return CalibrationPatch(tensors, _without_rim(box(mask).astype(bool)))


def _own_inputs(
    card: ModelCard, scan: Scan, corner: Corner, shape: Shape, multiple: Shape
) -> CalibrationPatch:
    x, y, z = (min(size, n) for size, n in zip(shape, scan.mask.shape, strict=True))
    part = scan.cut(box_at(corner, (x, y, z)))
    return _cut(network_inputs(card, part), part.mask, (0, 0, 0), shape, multiple)


def _without_rim(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = np.zeros_like(mask)
    x, y, z = (slice(rim, n - rim) for n in mask.shape for rim in (min(RIM, n // 8),))
    inner[x, y, z] = mask[x, y, z]
    return inner
