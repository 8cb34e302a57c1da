"""Every published network in one table for all tests: a new one is a row here.

As large as published, small enough to trace in seconds, and small in its authors' files.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.networks import chi_sepnet, loopnet, lpcnn, modl_qsm, susep_net
from qsm_deploy.export.networks.after_qsm import AfterRecon, AfterRefine
from qsm_deploy.export.networks.autoqsm import AutoQSM
from qsm_deploy.export.networks.bfrnet import BFRnet
from qsm_deploy.export.networks.blocks import ConvBlock
from qsm_deploy.export.networks.chi_sepnet import ChiSepnet
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder
from qsm_deploy.export.networks.ghpa import AXES, PLANES
from qsm_deploy.export.networks.iqsm import IQFM, IQSM
from qsm_deploy.export.networks.iqsm_plus import FoldedIQSMPlus, IQSMPlus
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.loopnet import LoopNet
from qsm_deploy.export.networks.lot import LotLayer
from qsm_deploy.export.networks.lpcnn import LPCNN
from qsm_deploy.export.networks.modl_qsm import EPSILON, ModlQsm
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Network
from qsm_deploy.export.networks.nextqsm import NextQsmField, NextQsmPrior
from qsm_deploy.export.networks.qsmgan import QSMGAN
from qsm_deploy.export.networks.qsmnet import NUMBERS, TORCH, Flavour, QSMnet
from qsm_deploy.export.networks.spinet_qsm import SpinetWeights
from qsm_deploy.export.networks.susep_net import SusepNet
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.export.networks.xqsm import XQSM
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.runtime.card.card import LOOPS
from tests.export import authors_files as files
from tests.export import golden
from tests.export.formula import State

TF1_WEIGHTS = Path(__file__).parent / "networks" / "golden" / "qsmnet_tf1_weights.npz"
QSMNET_WIDTHS = (32, 64, 128, 256, 512)
NEXTQSM_WIDTHS = (16, 32, 64, 128, 256, 512, 512)


def iqsm(features: int, kind: type[IQSM] = IQSM) -> IQSM:
    unet = EncoderDecoder(features, base=2, depth=1)
    return kind(unet, LotLayer(features), unet.divisor)


def iqsm_plus() -> FoldedIQSMPlus:
    unet = EncoderDecoder(3, base=2, depth=1)
    return FoldedIQSMPlus(ConvBlock(3, 3), unet, LotLayer(3), (0.0, 0.0, 1.0))


def iqsm_layers(features: int, base: int) -> tuple[ConvBlock, EncoderDecoder, LotLayer]:
    """Return the parts of iQSM and iQSM+ with four levels, as published."""
    unet = EncoderDecoder(features, base, depth=4)
    return ConvBlock(features, features), unet, LotLayer(features)


def iqsm_as_published(features: int, base: int, kind: type[IQSM] = IQSM) -> IQSM:
    return kind(*iqsm_layers(features, base)[1:], divisor=16)


def qsmnet(flavour: Flavour, kernel: int, widths: tuple[int, ...] = (2,) * 5) -> QSMnet:
    return QSMnet(widths, kernel, flavour, dict.fromkeys(NUMBERS, 0.5))


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


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes
    ----------
    graphs
        Its graphs at the published size, the default one first.
    small
        Small ones, by what there is a choice of.
    state
        The weights of a small one as its authors name and turn them.
    write
        Writes these to files as they do.
    numbers
        What goes with them to ``--normalisation``.
    trained
        What the published weights are trained in, where it is more than the graph.
    vectors
        What is known of its outputs; those of others are in tests of their own.
    """

    graphs: tuple[Callable[[], Network], ...]
    small: Mapping[str, Callable[[], Network]]
    state: Callable[[], State]
    write: Callable[[State, Path], list[Path]]
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    trained: Callable[[], nn.Module] | None = None
    vectors: tuple[golden.GoldenVector, ...] = ()


SEPARATION = dict.fromkeys(
    (f"{name}_{what}" for name in chi_sepnet.AUTHORS_NUMBERS for what in ("mean", "std")), 0.5
)
LEAKY, RECTIFIED = Flavour(1e-3, 0.1, skip_first=True), Flavour(1e-3, 0.0, skip_first=True)
NETWORKS = {
    "ir2qsm": Row(
        graphs=(IR2QSM,),
        small={
            "input": lambda: IR2QSM((2, 4), iterations=2),
            "iteration": lambda: IR2QSM((2, 4), iterations=2, residual="iteration"),
        },
        state=lambda: IR2QSM((2, 4, 8), iterations=2).state_dict(),
        write=files.write_pickle,
    ),
    "tv-unet": Row(
        graphs=(TvUnet,),
        small={"": tv_unet},
        state=lambda: TvUnet(4, 8, 4).state_dict(),
        write=files.write_safetensors,
    ),
    "loopnet": Row(
        graphs=(LoopNet,),
        small={
            "planes": lambda: LoopNet(4, PLANES, loops=2),
            "axes": lambda: LoopNet(4, AXES, loops=2, first_loop="copy", residual="iteration"),
        },
        state=lambda: LoopNet(4, loops=2).state_dict(),
        write=files.write_safetensors,
    ),
    "xqsm": Row(
        graphs=(XQSM,),
        small={"": lambda: XQSM(base=2, depth=1)},
        state=lambda: XQSM(base=1).state_dict(),
        write=files.write_pickle,
    ),
    "xqsm-unet": Row(
        graphs=(XqsmUnet,),
        small={"": lambda: XqsmUnet(base=2, depth=1)},
        state=lambda: XqsmUnet(base=2).state_dict(),
        write=files.write_pickle,
    ),
    "qsmnet": Row(
        graphs=(lambda: qsmnet(LEAKY, 5, QSMNET_WIDTHS),),
        small={"": lambda: qsmnet(LEAKY, 5)},
        state=lambda: load_state(TF1_WEIGHTS),
        write=files.write_npz,
        numbers=files.TF1_NORMALISATION,
    ),
    "qsmnet-plus": Row(
        graphs=(lambda: qsmnet(LEAKY, 5, QSMNET_WIDTHS),),
        small={"": lambda: qsmnet(RECTIFIED, 5)},
        state=lambda: load_state(TF1_WEIGHTS),
        write=files.write_npz,
        numbers=files.TF1_NORMALISATION,
    ),
    "qsmnet-torch": Row(
        graphs=(lambda: qsmnet(TORCH, 3, QSMNET_WIDTHS),),
        small={"": lambda: qsmnet(TORCH, 3)},
        state=lambda: qsmnet(TORCH, 3, (2, 2, 3, 3, 4)).state_dict(),
        write=files.write_wrapped("state_dict"),
        numbers=files.TF1_NORMALISATION,
    ),
    "lpcnn": Row(
        graphs=(LPCNN,),
        small={
            "split": lambda: prior(wide_resnet(1, width=4, blocks=2), 1, "lpcnn"),
            "unrolled": lambda: LPCNN(wide_resnet(1, width=2, blocks=1), orientations=2),
        },
        state=lambda: LPCNN(wide_resnet(1, 4, 2)).state_dict(),
        write=files.write_wrapped("model_state"),
    ),
    "modl-qsm": Row(
        graphs=(ModlQsm,),
        small={
            "split": lambda: prior(modl_gen(), 2, "modl"),
            "unrolled": lambda: ModlQsm(modl_gen()),
        },
        state=files.modl_state,
        write=files.write_h5,
    ),
    "spinet-qsm": Row(
        graphs=(lambda: Prior(wide_resnet(2), 2, "spinet", ANY_GEOMETRY, {}, {}),),
        small={"": lambda: prior(wide_resnet(2, width=2, blocks=1), 2, "spinet")},
        state=lambda: SpinetWeights(wide_resnet(2, 4, 2)).state_dict(),
        write=files.write_pickle,
        trained=lambda: SpinetWeights(wide_resnet(2)),
    ),
    "iqsm": Row(
        graphs=(lambda: iqsm_as_published(16, 16),),
        small={"v1": lambda: iqsm(1), "v2": lambda: iqsm(3)},
        state=lambda: files.without_unet_and_lot(iqsm_as_published(3, 2)),
        write=files.write_lot_apart,
    ),
    "iqfm": Row(
        graphs=(lambda: iqsm_as_published(16, 16, IQFM),),
        small={"": lambda: iqsm(3, IQFM)},
        state=lambda: files.without_unet_and_lot(iqsm_as_published(3, 2, IQFM)),
        write=files.write_lot_apart,
        vectors=(golden.IQFM,),
    ),
    "iqsm-plus": Row(
        graphs=(lambda: FoldedIQSMPlus(*iqsm_layers(16, 16), (0.0, 0.0, 1.0)),),
        small={"": iqsm_plus},
        state=lambda: files.without_unet_and_lot(IQSMPlus(*iqsm_layers(3, 2))),
        write=files.write_lot_apart,
        trained=lambda: IQSMPlus(*iqsm_layers(16, 16)),
    ),
    "bfrnet": Row(
        graphs=(BFRnet,),
        small={"": lambda: BFRnet(base=2, depth=1)},
        state=files.bfrnet_state,
        write=files.write_safetensors,
        vectors=(golden.BFRNET,),
    ),
    "nextqsm": Row(
        graphs=(
            lambda: NextQsmField(NEXTQSM_WIDTHS),
            lambda: NextQsmPrior(NEXTQSM_WIDTHS[:6], [1.0] * 6),
        ),
        small={
            "bf": lambda: NextQsmField((2, 3)),
            "vn": lambda: NextQsmPrior((2, 3), [1.0]),
        },
        state=files.nextqsm_state,
        write=files.write_h5,
        vectors=(golden.NEXTQSM_FIELD, golden.NEXTQSM_PRIOR),
    ),
    "qsmgan": Row(
        graphs=(QSMGAN,),
        small={"": lambda: QSMGAN(2, 1)},
        state=lambda: QSMGAN(2, 2).state_dict(),
        write=files.write_generator,
        vectors=(golden.QSMGAN,),
    ),
    "autoqsm": Row(
        graphs=(AutoQSM,),
        small={"": lambda: AutoQSM((2, 3))},
        state=files.autoqsm_state,
        write=files.write_h5,
        vectors=(golden.AUTOQSM,),
    ),
    "chi-sepnet": Row(
        graphs=(lambda: ChiSepnet(QSMNET_WIDTHS, 3, TORCH, SEPARATION),),
        small={"": lambda: ChiSepnet((2,) * 5, 3, TORCH, SEPARATION)},
        state=lambda: ChiSepnet((2, 2, 3, 3, 4), 3, TORCH, SEPARATION).state_dict(),
        write=files.write_wrapped("state_dict"),
        numbers=files.normalisation_of(chi_sepnet.AUTHORS_NUMBERS),
        vectors=(golden.CHI_SEPNET,),
    ),
    "susep-net": Row(
        graphs=(lambda: SusepNet(64, SEPARATION),),
        small={"": lambda: SusepNet(2, SEPARATION)},
        state=lambda: SusepNet(2, SEPARATION).state_dict(),
        write=files.write_pickle,
        numbers=files.normalisation_of(susep_net.AUTHORS_NUMBERS),
        vectors=(golden.SUSEP_NET,),
    ),
    "after-qsm": Row(
        graphs=(AfterRecon, AfterRefine),
        small={
            "recon": lambda: AfterRecon(base=2, depth=1),
            "refine": lambda: AfterRefine(2, 2, 1, 1, 2),
        },
        state=lambda: (
            AfterRecon(base=1, depth=2).state_dict()
            | AfterRefine(features=2, growth=2, blocks=2, layers=2, last=3).state_dict()
        ),
        write=files.write_halves,
    ),
}
# by the name in the registry, and what there is a choice of
SMALL: dict[str, Callable[[], Network]] = {
    f"{name} {choice}".strip(): make
    for name, row in NETWORKS.items()
    for choice, make in row.small.items()
}
VECTORS = {
    " ".join((name, *vector.options.values())): (name, vector)
    for name, row in NETWORKS.items()
    for vector in row.vectors
}


@contextlib.contextmanager
def shallow() -> Iterator[None]:
    """Leave out levels and iterations that only repeat operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loopnet, "LEVELS", 1)
        patch.setattr(lpcnn, "ITERATIONS", 2)
        patch.setattr(modl_qsm, "ITERATIONS", 2)
        yield
