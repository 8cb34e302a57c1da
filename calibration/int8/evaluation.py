"""Judging graphs with INT8 in them: what they reconstruct, against the network in FP32."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnxruntime

from qsm_deploy.calibration.graph.graph_run import GraphRun, GraphSession
from qsm_deploy.calibration.int8.map_error import MapError, map_error, worst
from qsm_deploy.kernels.bounding_box import box_at, corner_around
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps
from qsm_deploy.runtime.reconstruction.tiles import plan_for
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Session


class Int8Evaluation:
    """Acquisitions, and the maps that a network makes of them in FP32.

    Parameters
    ----------
    reference
        The network in FP32.
    open_rounded
        Opens a graph of it so that FP16 is rounded as a GPU rounds it.
    scans
        Small ones: every evaluation reconstructs them.
    """

    def __init__(
        self,
        reference: Session,
        open_rounded: Callable[[onnx.ModelProto], Session],
        scans: Sequence[Scan],
    ) -> None:
        self._card = reference.card
        self._open_rounded = open_rounded
        self._scans = tuple(scans)
        self._made = [prior_maps(self._card.priors, scan) for scan in self._scans]
        self._exact = [*self._maps(reference, slice(None))]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes of the acquisitions."""
        return tuple(scan.geometry.shape for scan in self._scans)

    def rounded_error(self, model: onnx.ModelProto) -> MapError:
        """Return the worst error of a graph, FP16 rounded as a GPU rounds it."""
        return self.session_error(self._open_rounded(model))

    def quick_error(self, model: onnx.ModelProto, *, last: bool = False) -> MapError:
        """Return the worst error of a graph in FP32 with Q/DQ, on all acquisitions or the last."""
        about = (self._card, "onnxruntime", onnxruntime.__version__)
        return self.session_error(GraphSession(GraphRun(model), *about), last=last)

    def session_error(self, session: Session, *, last: bool = False) -> MapError:
        """Return the worst error of a session of this network."""
        chosen = slice(-1, None) if last else slice(None)
        maps = self._maps(session, chosen)
        rows = zip(maps, self._exact[chosen], self._scans[chosen], strict=True)
        return worst(
            [
                map_error(*pair, scan)
                for got, exact, scan in rows
                for pair in zip(got, exact, strict=True)
            ]
        )

    def _maps(self, session: Session, chosen: slice) -> Iterator[Volume]:
        for scan, made in zip(self._scans[chosen], self._made[chosen], strict=True):
            plan = plan_for(self._card, scan.mask.shape)
            yield network_outputs(session, scan, plan, made=made)


def middle_of(scan: Scan, size: int, divisor: int) -> Scan:
    """Return the cube around the middle of an acquisition's mask, shorter where the grid is."""
    x, y, z = (int(np.median(axis)) for axis in np.nonzero(scan.mask))
    grid = scan.geometry.shape
    corner = corner_around((x, y, z), (size, size, size), grid, divisor=divisor)
    a, b, c = (min(size, n) for n in grid)
    return scan.cut(box_at(corner, (a, b, c)))
