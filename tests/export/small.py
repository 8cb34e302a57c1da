"""Every published network, small enough to trace in seconds: one table for all tests."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
from torch import nn

from qsm_deploy.export.networks import chi_sepnet, loopnet, lpcnn, modl_qsm
from qsm_deploy.export.networks.after_qsm import AfterRecon, AfterRefine
from qsm_deploy.export.networks.autoqsm import AutoQSM
from qsm_deploy.export.networks.bfrnet import BFRnet
from qsm_deploy.export.networks.blocks import ConvBlock
from qsm_deploy.export.networks.chi_sepnet import ChiSepnet
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder
from qsm_deploy.export.networks.ghpa import AXES, PLANES
from qsm_deploy.export.networks.iqsm import IQFM, IQSM
from qsm_deploy.export.networks.iqsm_plus import FoldedIQSMPlus
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.loopnet import LoopNet
from qsm_deploy.export.networks.lot import LotLayer
from qsm_deploy.export.networks.lpcnn import LPCNN
from qsm_deploy.export.networks.modl_qsm import EPSILON, ModlQsm
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Network
from qsm_deploy.export.networks.nextqsm import NextQsmField, NextQsmPrior
from qsm_deploy.export.networks.qsmgan import QSMGAN
from qsm_deploy.export.networks.qsmnet import NUMBERS, TORCH, Flavour, QSMnet
from qsm_deploy.export.networks.susep_net import SusepNet
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.export.networks.xqsm import XQSM
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.runtime.card.card import LOOPS


def iqsm(features: int, kind: type[IQSM] = IQSM) -> IQSM:
    unet = EncoderDecoder(features, base=2, depth=1)
    return kind(unet, LotLayer(features), unet.divisor)


def iqsm_plus() -> FoldedIQSMPlus:
    unet = EncoderDecoder(3, base=2, depth=1)
    return FoldedIQSMPlus(ConvBlock(3, 3), unet, LotLayer(3), (0.0, 0.0, 1.0))


def qsmnet(flavour: Flavour, kernel: int) -> QSMnet:
    return QSMnet((2,) * 5, kernel, flavour, dict.fromkeys(NUMBERS, 0.5))


def tv_unet(half: int = 4, quarter: int = 8, full: int = 4) -> TvUnet:
    """Return one that changes the map of total variation, as if trained."""
    network = TvUnet(half, quarter, full)
    for part in network.modules():
        if isinstance(part, nn.Conv3d):
            part.reset_parameters()
    return network


def prior(gen: nn.Sequential, channels: int, pipeline: str) -> Prior:
    numbers = dict.fromkeys(LOOPS[pipeline], 1.0)
    return Prior(gen, channels, pipeline, ANY_GEOMETRY, {}, numbers)


def modl_gen() -> nn.Sequential:
    return wide_resnet(2, width=2, blocks=1, epsilon=EPSILON, last_bias=True)


SEPARATION = dict.fromkeys(
    (f"{name}_{what}" for name in chi_sepnet.AUTHORS_NUMBERS for what in ("mean", "std")), 0.5
)

# by the name in the registry, and what there is a choice of
SMALL: dict[str, Callable[[], Network]] = {
    "ir2qsm input": lambda: IR2QSM((2, 4), iterations=2),
    "ir2qsm iteration": lambda: IR2QSM((2, 4), iterations=2, residual="iteration"),
    "tv-unet": tv_unet,
    "loopnet planes": lambda: LoopNet(4, PLANES, loops=2),
    "loopnet axes": lambda: LoopNet(4, AXES, loops=2, first_loop="copy", residual="iteration"),
    "xqsm": lambda: XQSM(base=2, depth=1),
    "xqsm-unet": lambda: XqsmUnet(base=2, depth=1),
    "qsmnet": lambda: qsmnet(Flavour(1e-3, 0.1, skip_first=True), 5),
    "qsmnet-plus": lambda: qsmnet(Flavour(1e-3, 0.0, skip_first=True), 5),
    "qsmnet-torch": lambda: qsmnet(TORCH, 3),
    "lpcnn split": lambda: prior(wide_resnet(1, width=4, blocks=2), 1, "lpcnn"),
    "lpcnn unrolled": lambda: LPCNN(wide_resnet(1, width=2, blocks=1), orientations=2),
    "modl-qsm split": lambda: prior(modl_gen(), 2, "modl"),
    "modl-qsm unrolled": lambda: ModlQsm(modl_gen()),
    "spinet-qsm": lambda: prior(wide_resnet(2, width=2, blocks=1), 2, "spinet"),
    "iqsm v1": lambda: iqsm(1),
    "iqsm v2": lambda: iqsm(3),
    "iqfm": lambda: iqsm(3, IQFM),
    "iqsm-plus": iqsm_plus,
    "qsmgan": lambda: QSMGAN(2, 1),
    "autoqsm": lambda: AutoQSM((2, 3)),
    "nextqsm bf": lambda: NextQsmField((2, 3)),
    "nextqsm vn": lambda: NextQsmPrior((2, 3), [1.0]),
    "bfrnet": lambda: BFRnet(base=2, depth=1),
    "chi-sepnet": lambda: ChiSepnet((2,) * 5, 3, TORCH, SEPARATION),
    "susep-net": lambda: SusepNet(2, SEPARATION),
    "after-qsm recon": lambda: AfterRecon(base=2, depth=1),
    "after-qsm refine": lambda: AfterRefine(2, 2, 1, 1, 2),
}


@contextlib.contextmanager
def shallow() -> Iterator[None]:
    """Leave out levels and iterations that only repeat operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loopnet, "LEVELS", 1)
        patch.setattr(lpcnn, "ITERATIONS", 2)
        patch.setattr(modl_qsm, "ITERATIONS", 2)
        yield
