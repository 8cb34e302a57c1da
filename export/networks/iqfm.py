"""iQFM: wrapped phase of one echo to the local field, by the network of iQSM.

Gao et al., NeuroImage 259:119410 (2022), doi 10.1016/j.neuroimage.2022.119410.
"""

from collections.abc import Mapping

from torch import Tensor

from qsm_deploy.export.networks.iqsm import IQFM, IQSM, iqsm_from_state
from qsm_deploy.export.networks.network import Choices


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> IQSM:
    """Build the network that a state dict describes, as that of iQSM.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    return iqsm_from_state(state, IQFM)
