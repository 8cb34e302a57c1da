"""BFRnet: total field to local field, by a U-net of octave convolutions for the background field.

It is built as xQSM, with one convolution at the start and levels of twice the width. The network
adds its input to what it computes, and that is the background; the local field is the input less
the background, so the input cancels: the graph here is the U-net with the opposite sign.

Zhu et al., Z Med Phys 33:578-590 (2023), doi 10.1016/j.zemedi.2022.08.001. The keys are the names
of the layers in the authors' MATLAB network, as they are or with other signs between the words.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import LOCAL_FIELD, TOTAL_FIELD, Choices, Network
from qsm_deploy.export.networks.octave import (
    OctaveConv,
    OctaveDecoder,
    OctaveInput,
    OctaveOutput,
    through_levels,
)
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts
from qsm_deploy.kernels.errors import WeightsError

SUFFIXES = ("weight", "bias", "running_mean", "running_var")
# of the authors' layers, the names in an octave convolution and in an up-sampling
CONV = {
    **{f"Conv-{way}": f"conv{way}" for way in ("HH", "HL", "LL", "LH")},
    **{f"BN_{way}": f"BN_{way}" for way in ("HH", "HL", "LL", "LH")},
    "UpConv-LH": "up",
}
UP = {
    **{f"UpConv{way}": f"up_{way}" for way in ("HH", "LH", "LL")},
    **{"convHL": "up_HL", "BN_H": "BN_H", "BN_L": "BN_L"},
}


class BFRnet(Network):
    """Total field, 0 outside the mask, to local field, both (n, 1, x, y, z) in ppm.

    Level i has ``base * 2**(i + 1)`` channels in each band; the bottleneck doubles those of the
    coarsest level and returns to them.

    Parameters
    ----------
    base
        Channels of the first convolution in each of the two bands, half the number in the paper.
    depth
        Levels, each of which halves the resolution of both bands.
    """

    inputs = (TOTAL_FIELD,)
    output = LOCAL_FIELD

    def __init__(self, base: int = 32, depth: int = 2) -> None:
        super().__init__()
        widths = [2 * base * 2**level for level in range(depth)]
        finest, coarsest = widths[0], widths[-1]
        self.first = OctaveInput(1, base)
        self.encoders = nn.ModuleList(
            nn.Sequential(OctaveConv(before, c), OctaveConv(c, c))
            for before, c in zip([base, *widths], widths, strict=False)
        )
        self.middle = nn.Sequential(
            OctaveConv(coarsest, 2 * coarsest), OctaveConv(2 * coarsest, coarsest)
        )
        self.decoders = nn.ModuleList(
            OctaveDecoder(c, after)
            for c, after in zip(widths[::-1], [*widths[-2::-1], finest], strict=True)
        )
        self.last = OctaveOutput(finest, finest)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this; the low band doubles it."""
        return int(2 ** (len(self.encoders) + 1))

    def forward(self, total_field_ppm: Tensor) -> Tensor:
        """Return ``local_field_ppm``."""
        bands = self.first(total_field_ppm)
        bands = through_levels(bands, self.encoders, self.middle, self.decoders)
        background_less_input: Tensor = self.last(bands)
        return -background_less_input


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> BFRnet:
    """Build the network that a state dict describes, its width and depth read off it.

    Raises
    ------
    WeightsError
        If a key is missing, left over, there twice or of the wrong shape.
    """
    named = {_only_words(key): key for key in state}
    if len(named) < len(state):
        twice = min(state.keys() - named.values())
        raise WeightsError(f"{twice} is the name of two layers; pass the file for this network")
    depth = count_parts(named, "EncoderSection{}Oct", first=1)
    layers = dict(authors_layers(depth))
    authors_keys = {
        f"{ours}.{what}": f"{theirs}.{what}" for ours, theirs in layers.items() for what in SUFFIXES
    }
    known = {_only_words(theirs): theirs for theirs in authors_keys.values()}
    given = {known.get(name, key): state[key] for name, key in named.items()}
    first = "Input-Conv-HH.weight"
    require_keys(given, [first, "EncoderSection-1-Oct1-Conv-HH.weight"], "bfrnet")
    network = BFRnet(channels_of(given, first), depth)
    ours = {theirs: key for key, theirs in authors_keys.items()}
    own_state = {ours.get(key, key): value for key, value in given.items()}
    load_strictly(network, own_state, authors_keys=authors_keys)
    return network.eval()


def _only_words(key: str) -> str:
    """Return a key with nothing but letters, digits and dots in it."""
    return re.sub(r"[^A-Za-z0-9.]", "", key)


def authors_layers(depth: int) -> Iterator[tuple[str, str]]:
    """Give the name of each layer here, and what the authors call it.

    The first block has fewer layers than are given for it, and so has the last.
    """
    blocks = {"first": "Input", "last": "Output"}
    blocks |= {f"middle.{n}": f"MidSection-{n + 1}-Oct1" for n in (0, 1)}
    for level in range(depth):
        for n in (0, 1):
            blocks[f"encoders.{level}.{n}"] = f"EncoderSection-{level + 1}-Oct{n + 1}"
            decoder = f"decoders.{level}.DecodeConv{n + 1}"
            blocks[decoder] = f"DecoderSection-{level + 1}-Oct{n + 1}"
        up = f"decoders.{level}.up"
        yield from ((f"{up}.{n}", f"Decoder-Section-{level + 1}-{t}") for t, n in UP.items())
    for block, name in blocks.items():
        yield from ((f"{block}.{n}", f"{name}-{t}") for t, n in CONV.items())
    yield "last.FinalConv", "Final-ConvolutionLayer"
