"""Judging graphs with INT8 in them: what they reconstruct, against PyTorch in FP32."""

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from qsm_deploy.calibration.graph.graph_run import GraphRun
from qsm_deploy.calibration.map_error import MapError, map_error, worst
from qsm_deploy.export.graph.rounded_run import RoundedRun
from qsm_deploy.export.measure.rounding import RoundedSession
from qsm_deploy.export.measure.verification import ModuleSession
from qsm_deploy.export.networks.network import Network
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import network_output
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Session


class Int8Evaluation:
    """Acquisitions, and the maps that PyTorch makes of them in FP32.

    Parameters
    ----------
    module
        The network, in evaluation mode.
    card
        Its card.
    scans
        Small ones: every evaluation reconstructs them.
    """

    def __init__(self, module: Network, card: ModelCard, scans: Sequence[Scan]) -> None:
        self._card = card
        self._scans = tuple(scans)
        reference = ModuleSession(module, card)
        self._exact = [_reconstruct(reference, scan) for scan in self._scans]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes of the acquisitions."""
        return tuple(scan.geometry.shape for scan in self._scans)

    def rounded_error(self, model: onnx.ModelProto) -> MapError:
        """Return the worst error of a graph, FP16 rounded as a GPU rounds it."""
        return self.session_error(RoundedSession(RoundedRun(model), self._card))

    def quick_error(self, model: onnx.ModelProto, *, last: bool = False) -> MapError:
        """Return the worst error of a graph in FP32 with Q/DQ, on all acquisitions or the last."""
        return self.session_error(RoundedSession(GraphRun(model), self._card), last=last)

    def session_error(self, session: Session, *, last: bool = False) -> MapError:
        """Return the worst error of a session of this network."""
        chosen = slice(-1, None) if last else slice(None)
        errors = [
            map_error(_reconstruct(session, scan), exact, scan)
            for scan, exact in zip(self._scans[chosen], self._exact[chosen], strict=True)
        ]
        return worst(errors)


def _reconstruct(session: Session, scan: Scan) -> NDArray[np.float32]:
    plan = plan_whole(scan.mask.shape, session.card.divisor)
    return network_output(session, scan, plan)
