"""iQSM+: iQSM for any direction of B0, folded into an ordinary network for one direction.

The published network embeds the direction and lets it edit every convolution: to output channel
``o`` it adds ``s_o`` times one kernel ``K`` applied to the sum of all input channels, and ``t_o``.
For a given direction that is a convolution with the kernels ``W + s K`` and the biases ``b + t``,
so the graph holds neither the embedding nor the added convolutions.

Gao et al., Med Image Anal 94:103160 (2024), doi 10.1016/j.media.2024.103160.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.blocks import ConvBlock
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder
from qsm_deploy.export.networks.iqsm import IQSM, NOT_TURNED, UNET, require_lot_file, whole_state
from qsm_deploy.export.networks.lot import LotLayer
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts
from qsm_deploy.kernels.errors import UsageError

EMBEDDING, HIDDEN = 5, 10
Direction = tuple[float, float, float]


class FoldedIQSMPlus(IQSM):
    """iQSM+ for one direction of B0: iQSM with one more layer before the U-net."""

    def __init__(
        self, first: ConvBlock, plain: EncoderDecoder, lot: LotLayer, b0_direction: Direction
    ) -> None:
        super().__init__(nn.Sequential(first, plain), lot, plain.divisor)
        self.geometry = replace(NOT_TURNED, b0_direction=b0_direction)


class IQSMPlus(nn.Module):
    """The published network's weights under its names; the plain layers are those given.

    Parameters
    ----------
    first, plain, lot
        Layers of the network to fold into: loading this module fills them, folding edits them.
    """

    def __init__(self, first: ConvBlock, plain: EncoderDecoder, lot: LotLayer) -> None:
        super().__init__()
        self.Unet = OrientedUnet(first, plain)
        self.LoT_Layer = lot

    @torch.no_grad()
    def fold(self, b0_direction: Direction) -> None:
        """Edit the given layers, once, for a direction in voxel axes.

        The network knows directions that lie nearer to the third axis than to the second, and
        points along the third: exchanging the two axes in every kernel serves the others, and
        the opposite direction is the same field.
        """
        x, y, z = b0_direction
        exchanged = abs(y) > abs(z)
        if exchanged:
            y, z = z, y
        direction = torch.tensor([x, y, z]) * (-1 if z < 0 else 1)
        embedding = self.Unet.Z_embed(direction / direction.norm())
        for layer in self.modules():
            if isinstance(layer, OrientedConv):
                layer.fold(embedding)
        if exchanged:
            for kernels in (p for p in self.parameters() if p.ndim == 5):
                kernels.copy_(kernels.transpose(3, 4).clone())


class OrientedUnet(nn.Module):
    """A plain U-net and the layer before it, with what edits each of their convolutions."""

    def __init__(self, first: ConvBlock, plain: EncoderDecoder) -> None:
        super().__init__()
        self.Z_embed = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, EMBEDDING))
        self.ini_embd_layer = OrientedConv(first.conv)
        self.EncodeConvs = nn.ModuleList(
            OrientedConvs(level.get_submodule("EncodeConv")) for level in plain.EncodeConvs
        )
        self.MidConv1 = OrientedConvs(plain.get_submodule("MidConv1.MidConv"))
        self.DecodeConvs = nn.ModuleList(
            OrientedConvs(level.get_submodule("DecodeConv"), level.get_submodule("up"))
            for level in plain.DecodeConvs
        )
        self.FinalConv = plain.FinalConv


class OrientedConvs(nn.Module):
    """The two convolutions of a level, and the up-sampling before them, which is never edited."""

    def __init__(self, convs: nn.Module, up: nn.Module | None = None) -> None:
        super().__init__()
        if up is not None:
            self.up = up
        self.embd_layer1 = OrientedConv(convs)
        self.embd_layer2 = OrientedConv(convs, at=3)


class OrientedConv(nn.Module):
    """One convolution and its normalisation, layers ``at`` and ``at + 1`` of ``convs``."""

    def __init__(self, convs: nn.Module, at: int = 0) -> None:
        super().__init__()
        conv, norm = (convs.get_submodule(str(at + n)) for n in range(2))
        self.embed_hwd = Edit(27)
        self.embed_c = Edit(2 * len(conv.get_parameter("bias")))
        self.EncodeConv = nn.Sequential(conv)
        self.BN_RELU = nn.Sequential(norm)

    def fold(self, embedding: Tensor) -> None:
        """Add the edits to the convolution."""
        kernel = self.embed_hwd(embedding).view(3, 3, 3)
        scale, shift = self.embed_c(embedding).chunk(2)
        self.EncodeConv.get_parameter("0.weight").add_(scale[:, None, None, None, None] * kernel)
        self.EncodeConv.get_parameter("0.bias").add_(shift)


class Edit(nn.Module):
    """What makes the numbers of one edit from the embedding."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.embd = nn.Sequential(
            nn.SiLU(), nn.Linear(EMBEDDING, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, numbers)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Map (5,) to (numbers,)."""
        y: Tensor = self.embd(embedding)
        return y


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> FoldedIQSMPlus:
    """Build the network that a state dict describes, folded for ``choices.b0_direction``.

    Parameters
    ----------
    state
        The U-net's file and the LoT layer's merged, with or without ``Unet.`` and ``LoT_Layer.``
        before the names.
    choices
        Its ``b0_direction`` is a vector in voxel axes; its sign has no meaning.

    Raises
    ------
    UsageError
        If no direction was chosen.
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    if choices.b0_direction is None:
        raise UsageError(
            "iqsm-plus is exported for one direction of B0; pass --b0-direction X Y Z, "
            "in voxel axes (0 0 1 for an axial scan)"
        )
    whole = whole_state(state)
    first = f"{UNET}ini_embd_layer.EncodeConv.0.weight"
    finest = f"{UNET}EncodeConvs.0.embd_layer1.EncodeConv.0.weight"
    require_keys(whole, [first, finest], "iqsm-plus")
    require_lot_file(whole, "iqsm-plus")
    features, base = channels_of(whole, first), channels_of(whole, finest)
    depth = count_parts(whole, UNET + "EncodeConvs.{}.")
    parts = ConvBlock(features, features), EncoderDecoder(features, base, depth), LotLayer(features)
    published = IQSMPlus(*parts)
    load_strictly(published, whole)
    published.fold(choices.b0_direction)
    return FoldedIQSMPlus(*parts, choices.b0_direction).eval()
