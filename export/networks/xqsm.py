"""xQSM: a U-net of octave convolutions, added to the field.

Gao et al., NMR Biomed 34:e4461 (2021), doi 10.1002/nbm.4461. The noise layers of its training are
not part of inference. Attribute names are the authors', so that their checkpoint loads key by key.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.octave import (
    OctaveConv,
    OctaveDecoder,
    OctaveInput,
    OctaveOutput,
    through_levels,
)
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts


class XQSM(Network):
    """Local field to susceptibility, both (n, 1, x, y, z) in ppm.

    Level i has ``base * 2**i`` channels in each band. The bottleneck doubles those of the coarsest
    level and returns to them.

    Parameters
    ----------
    base
        Channels of the finest level in each of the two bands, half the number in the paper.
    depth
        Levels, each of which halves the resolution of both bands.
    """

    def __init__(self, base: int = 32, depth: int = 2) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(depth)]
        coarsest = widths[-1]
        self.InputOct = _TwoConvs("EncodeConv", OctaveInput(1, base), OctaveConv(base, base))
        self.EncodeConvs = nn.ModuleList(
            _TwoConvs("EncodeConv", OctaveConv(before, c), OctaveConv(c, c))
            for before, c in zip([base, *widths], widths, strict=False)
        )
        self.MidConv1 = _TwoConvs(
            "MidConv", OctaveConv(coarsest, 2 * coarsest), OctaveConv(2 * coarsest, coarsest)
        )
        self.DecodeConvs = nn.ModuleList(
            OctaveDecoder(c, after)
            for c, after in zip(widths[::-1], [*widths[-2::-1], base], strict=True)
        )
        self.FinalOct = OctaveOutput(base, 2 * base)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this; the low band doubles it."""
        return int(2 ** (len(self.EncodeConvs) + 1))

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        """Return ``chi_ppm`` of a (n, 1, x, y, z) field."""
        bands = self.InputOct(local_field_ppm)
        bands = through_levels(bands, self.EncodeConvs, self.MidConv1, self.DecodeConvs)
        correction: Tensor = self.FinalOct(bands)
        return correction + local_field_ppm


class _TwoConvs(nn.Sequential):
    """Two octave convolutions under the keys ``{name}1`` and ``{name}2``."""

    def __init__(self, name: str, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.add_module(f"{name}1", first)
        self.add_module(f"{name}2", second)


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> XQSM:
    """Build the network that a state dict describes, its width and depth read off the shapes.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    first = "InputOct.EncodeConv1.convHH.weight"
    require_keys(state, [first, "EncodeConvs.0.EncodeConv1.convHH.weight"], "xqsm")
    network = XQSM(channels_of(state, first), count_parts(state, "EncodeConvs.{}."))
    load_strictly(network, state)
    return network.eval()
