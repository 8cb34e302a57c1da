"""Every network becomes a TensorRT-RTX plan, in FP32, FP16 and INT8, for many batches and sizes.

Building needs no GPU, even loading a plan does. So these tests say that TensorRT-RTX knows every
operator as the export uses it, and not that it computes the right thing.
"""

from collections.abc import Callable
from dataclasses import replace

import onnx
import onnx.parser
import pytest
from torch import nn

from qsm_deploy.calibration.int8.layers import int8_layers
from qsm_deploy.calibration.int8.qdq import Quantiser
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.networks import loopnet, lpcnn, modl_qsm
from qsm_deploy.export.networks.after_qsm import AfterRecon, AfterRefine
from qsm_deploy.export.networks.blocks import ConvBlock, fold_batch_norm
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder
from qsm_deploy.export.networks.ghpa import AXES, PLANES
from qsm_deploy.export.networks.iqsm import IQSM
from qsm_deploy.export.networks.iqsm_plus import FoldedIQSMPlus
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.loopnet import LoopNet
from qsm_deploy.export.networks.lot import LotLayer
from qsm_deploy.export.networks.lpcnn import LPCNN
from qsm_deploy.export.networks.modl_qsm import EPSILON, ModlQsm
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Choices, Network
from qsm_deploy.export.networks.qsmnet import NUMBERS, TORCH, Flavour, QSMnet
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.tkd_unet import TkdUnet
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.export.networks.xqsm import XQSM
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.export.tensorrt.builder import build_plan
from qsm_deploy.export.tensorrt.choices import PlanChoices
from qsm_deploy.export.tensorrt.config import plan_target
from qsm_deploy.export.tensorrt.profile import profile_from
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import ExportError

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def iqsm(features: int) -> IQSM:
    unet = EncoderDecoder(features, base=2, depth=1)
    return IQSM(unet, LotLayer(features), unet.divisor)


def iqsm_plus() -> FoldedIQSMPlus:
    unet = EncoderDecoder(3, base=2, depth=1)
    return FoldedIQSMPlus(ConvBlock(3, 3), unet, LotLayer(3), (0.0, 0.0, 1.0))


def qsmnet(flavour: Flavour, kernel: int) -> QSMnet:
    return QSMnet((2,) * 5, kernel, flavour, dict.fromkeys(NUMBERS, 0.5))


def prior(gen: nn.Sequential, channels: int, pipeline: str) -> Prior:
    return Prior(gen, channels, pipeline, ANY_GEOMETRY, {}, {})


def modl_gen() -> nn.Sequential:
    return wide_resnet(2, width=2, blocks=1, epsilon=EPSILON, last_bias=True)


# by the name in the registry, and what there is a choice of
SMALL: dict[str, Callable[[], Network]] = {
    "ir2qsm input": lambda: IR2QSM((2, 4), iterations=2),
    "ir2qsm iteration": lambda: IR2QSM((2, 4), iterations=2, residual="iteration"),
    "tkd-unet": lambda: TkdUnet((2, 4)),
    "loopnet planes": lambda: LoopNet(4, PLANES, loops=2),
    "loopnet axes": lambda: LoopNet(4, AXES, loops=2, first_loop="copy", residual="iteration"),
    "xqsm": lambda: XQSM(base=2, depth=1),
    "xqsm-unet": lambda: XqsmUnet(base=2, depth=1),
    "qsmnet": lambda: qsmnet(Flavour(1e-3, 0.1, skip_first=True), 5),
    "qsmnet-plus": lambda: qsmnet(Flavour(1e-3, 0.0, skip_first=True), 5),
    "qsmnet-torch": lambda: qsmnet(TORCH, 3),
    "lpcnn split": lambda: prior(wide_resnet(1, width=2, blocks=1), 1, "lpcnn"),
    "lpcnn unrolled": lambda: LPCNN(wide_resnet(1, width=2, blocks=1), orientations=2),
    "modl-qsm split": lambda: prior(modl_gen(), 2, "modl"),
    "modl-qsm unrolled": lambda: ModlQsm(modl_gen()),
    "spinet-qsm": lambda: prior(wide_resnet(2, width=2, blocks=1), 2, "spinet"),
    "iqsm v1": lambda: iqsm(1),
    "iqsm v2": lambda: iqsm(3),
    "iqsm-plus": iqsm_plus,
    "after-qsm recon": lambda: AfterRecon(base=2, depth=1),
    "after-qsm refine": lambda: AfterRefine(2, 2, 1, 1, 2),
}
# what it says of the dipole operator in the forms that it lacks
REFUSED = {"function": "value_string", "plugin": "tensorrt-rtx takes no plugins"}
DFT = """<ir_version: 10, opset_import: ["": 20]>
g (float[1, x, 1] local_field_ppm) => (float[1, x, 2] y) { y = DFT(local_field_ppm) }"""


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out levels and iterations that only repeat operators."""
    monkeypatch.setattr(loopnet, "LEVELS", 1)
    monkeypatch.setattr(lpcnn, "ITERATIONS", 2)
    monkeypatch.setattr(modl_qsm, "ITERATIONS", 2)


def plan_of(model: onnx.ModelProto, network: Network) -> bytes:
    """Return a plan for many shapes, or fail with what TensorRT-RTX says of the graph."""
    card = provisional_card(REGISTRY["ir2qsm"], network, Choices(), "none", "0" * 64)
    profile = profile_from("16,64,256", network.divisor, patchable=True)
    choices = PlanChoices("tensorrt-rtx")
    card = replace(card, options=plan_target(choices).options())
    plan = build_plan(model, card, profile, choices)
    assert plan.data.count(card.to_json().encode()) == 1
    return plan.data


def in_int8(model: onnx.ModelProto, half: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with all in INT8 that may be; building does not ask for true ranges."""
    layers = int8_layers(model.graph, reducible_nodes(model.graph))
    assert layers
    amax = {layer.activation: 1.0 for layer in layers}
    quantised = Quantiser.from_model(model, layers, amax).quantised(half, layers)
    onnx.checker.check_model(quantised, full_check=True)
    return quantised


@pytest.mark.parametrize("case", SMALL)
def test_it_builds(case: str, shallow, formula_state) -> None:
    network = SMALL[case]()
    network.load_state_dict(formula_state(network.state_dict()))
    if "unrolled" in case or "loopnet" in case:
        fold_batch_norm(network)
    model = onnx_from_module(network.eval())
    half = with_precision(model, "fp16")
    for graph in (model, half, in_int8(model, half)):
        assert len(plan_of(graph, network)) > 100_000


@pytest.mark.parametrize("multiplier", ["dipole", "dipole_squared", "tkd", "tikhonov"])
def test_the_dipole_operator_builds(multiplier: str, dipole_network) -> None:
    network = dipole_network(multiplier)
    assert len(plan_of(onnx_from_module(network, "matmul"), network)) > 10_000


@pytest.mark.parametrize("dipole_op", REFUSED)
def test_other_forms_of_the_dipole_operator_are_refused(dipole_op: str, dipole_network) -> None:
    network = dipole_network("dipole")
    with pytest.raises(ExportError, match=REFUSED[dipole_op]):
        plan_of(onnx_from_module(network, dipole_op), network)


def test_it_has_no_transposed_convolution_in_bf16(tiny_tkd_unet) -> None:
    model = with_precision(onnx_from_module(tiny_tkd_unet), "bf16")
    with pytest.raises(ExportError, match="tensorrt-rtx cannot build this network"):
        plan_of(model, tiny_tkd_unet)


def test_every_network_is_here() -> None:
    assert {case.split()[0] for case in SMALL} == set(REGISTRY)


def test_an_operator_that_it_lacks_is_refused(tiny_ir2qsm) -> None:
    with pytest.raises(ExportError, match="DFT"):
        plan_of(onnx.parser.parse_model(DFT), tiny_ir2qsm)
