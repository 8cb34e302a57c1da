"""iQSM: wrapped phase of one echo straight to susceptibility; iQFM: to the local field.

A LoT layer makes the phase into features, a U-net adds to the first of them, and a quarter of the
sum is the susceptibility. The two published versions differ in the layer: one fixed Laplacian, or
sixteen learned kernels. Their scripts pad with the larger half in front, and with the smaller.
iQFM is the same network, trained for the field: nothing in its weights tells it from iQSM.

The phase must have the sign of the training data, ``phase = -gamma dB TE``; with the
other sign the features are the opposite of any that the U-net knows.

Gao et al., NeuroImage 259:119410 (2022), doi 10.1016/j.neuroimage.2022.119410.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder, encoder_decoder_size
from qsm_deploy.export.networks.lot import LotLayer, fixed_laplacian
from qsm_deploy.export.networks.network import (
    AXIAL_1MM,
    ECHO_TIME,
    FIELD_STRENGTH,
    LOCAL_FIELD,
    MASK,
    PHASE,
    Choices,
    Network,
)
from qsm_deploy.kernels.errors import WeightsError

UNET, LOT = "Unet.", "LoT_Layer."
OUTPUT_SCALE = 1 / 4
# what the authors' scripts do around the network: they turn the phase round, and keep off the
# edge of the mask, where the phase has no neighbours
PHASE_CONVENTIONS = {"phase_sign": -1.0, "mask_erosion_voxels": 3.0}
# a wrapped phase is refused beyond the tolerance, where a field would be turned
NOT_TURNED = replace(AXIAL_1MM, b0_tolerance_deg=5.0)


class IQSM(Network):
    """(n, 1, x, y, z) phase [rad] and mask, echo time [s] and field strength [T] to chi [ppm].

    Parameters
    ----------
    unet
        (n, features, x, y, z) to (n, 1, x, y, z).
    lot
        The layer that makes those features.
    divisor
        Of the U-net.
    """

    inputs = (PHASE, MASK, ECHO_TIME, FIELD_STRENGTH)
    geometry = NOT_TURNED
    constants = PHASE_CONVENTIONS

    def __init__(self, unet: nn.Module, lot: LotLayer, divisor: int) -> None:
        super().__init__()
        self.Unet = unet
        self.LoT_Layer = lot
        self._divisor = divisor

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return self._divisor

    def forward(
        self, phase_rad: Tensor, mask: Tensor, echo_time_s: Tensor, field_strength_t: Tensor
    ) -> Tensor:
        """Return ``chi_ppm``, not masked."""
        features = self.LoT_Layer(phase_rad, mask, echo_time_s, field_strength_t)
        chi: Tensor = (self.Unet(features) + features[:, :1]) * OUTPUT_SCALE
        return chi


class IQFM(IQSM):
    """As :class:`IQSM`, to ``local_field_ppm``."""

    output = LOCAL_FIELD


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> IQSM:
    """Build the network that a state dict describes: version, width and depth from its shapes.

    Parameters
    ----------
    state
        The U-net's file and the LoT layer's merged, with or without ``Unet.`` and ``LoT_Layer.``
        before the names. The first version needs no LoT file.
    choices
        None matters here.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    return iqsm_from_state(state, IQSM)


def iqsm_from_state(state: Mapping[str, Tensor], kind: type[IQSM]) -> IQSM:
    """Build an iQSM or an iQFM; see :func:`network_from_state`."""
    name = kind.__name__.lower()
    whole = whole_state(state)
    unet = {key.removeprefix(UNET): value for key, value in whole.items() if key.startswith(UNET)}
    features, base, depth = encoder_decoder_size(unet, name)
    if features == 1:
        whole.setdefault(f"{LOT}conv_x", fixed_laplacian())
    require_lot_file(whole, name)
    plain = EncoderDecoder(features, base, depth)
    network = kind(plain, LotLayer(features), plain.divisor)
    load_strictly(network, whole)
    if features > 1:
        network.pad_front = "floor"
    return network.eval()


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with ``Unet.`` or ``LoT_Layer.`` before each name."""

    def whole_key(key: str) -> str:
        if key.startswith((UNET, LOT)):
            return key
        return f"{LOT if key in ('conv_x', 'conv_y') else UNET}{key}"

    return {whole_key(key): value for key, value in state.items()}


def require_lot_file(whole: Mapping[str, Tensor], name: str) -> None:
    """Check that the LoT layer's file was passed too.

    Raises
    ------
    WeightsError
        If it was not.
    """
    if f"{LOT}conv_x" not in whole:
        raise WeightsError(
            f"the weights of {name} lack {LOT}conv_x; its authors publish two files, "
            "pass that of the LoT layer together with that of the U-net"
        )
