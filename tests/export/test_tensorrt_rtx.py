"""Every network becomes a TensorRT-RTX plan for any batch and size.

Building needs no GPU, even loading a plan does. So these tests say that TensorRT-RTX knows every
operator as the export uses it, and not that it computes the right thing.
"""

from collections.abc import Callable

import onnx
import onnx.parser
import pytest
from torch import nn

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
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Network
from qsm_deploy.export.networks.qsmnet import NUMBERS, TORCH, Flavour, QSMnet
from qsm_deploy.export.networks.tkd_unet import TkdUnet
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.export.networks.xqsm import XQSM
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.export.onnx_export import onnx_from_module
from qsm_deploy.export.registry import REGISTRY

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

# smallest, typical and largest that the plan must serve
BATCHES = (1, 1, 4)
SIZES = (16, 64, 256)


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
REFUSED = {"function": "value_string", "dft": "DFT", "plugin": "Plugin not found"}
DFT = """<ir_version: 10, opset_import: ["": 20]>
g (float[1, x, 1] local_field_ppm) => (float[1, x, 2] y) { y = DFT(local_field_ppm) }"""


class Errors(trt.ILogger):
    """Keeps what went wrong; TensorRT takes one logger for the whole process."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.messages.append(message)


@pytest.fixture(scope="module")
def errors() -> Errors:
    return Errors()


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out levels and iterations that only repeat operators."""
    monkeypatch.setattr(loopnet, "LEVELS", 1)
    monkeypatch.setattr(lpcnn, "ITERATIONS", 2)
    monkeypatch.setattr(modl_qsm, "ITERATIONS", 2)


def build_plan(model: onnx.ModelProto, errors: Errors) -> bytes:
    """Return the plan, or fail with what TensorRT-RTX says of the graph."""
    errors.messages.clear()
    builder = trt.Builder(errors)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, errors)
    parsed = parser.parse(model.SerializeToString())
    refused = [
        f"{e.node_operator()} ({e.node_name()}): {e.desc()}"
        for e in map(parser.get_error, range(parser.num_errors))
    ]
    assert parsed == (not refused)
    assert not refused
    profile = builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *_shapes(tensor.shape))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, errors.messages
    return bytes(plan)


def _shapes(shape: trt.Dims) -> list[list[int]]:
    """Return the smallest, typical and largest shape of (-1, c, -1, -1, -1)."""
    return [[n, shape[1], size, size, size] for n, size in zip(BATCHES, SIZES, strict=True)]


@pytest.mark.parametrize("case", SMALL)
def test_it_builds(case: str, shallow, errors, formula_state) -> None:
    network = SMALL[case]()
    network.load_state_dict(formula_state(network.state_dict()))
    if "unrolled" in case or "loopnet" in case:
        fold_batch_norm(network)
    assert SIZES[0] % network.divisor == 0
    plan = build_plan(onnx_from_module(network.eval()), errors)
    assert len(plan) > 100_000


@pytest.mark.parametrize("multiplier", ["dipole", "dipole_squared", "tkd", "tikhonov"])
def test_the_dipole_operator_builds(multiplier: str, errors, dipole_network) -> None:
    plan = build_plan(onnx_from_module(dipole_network(multiplier), "matmul"), errors)
    assert len(plan) > 10_000


@pytest.mark.parametrize("dipole_op", REFUSED)
def test_other_forms_of_the_dipole_operator_are_refused(
    dipole_op: str, errors, dipole_network
) -> None:
    model = onnx_from_module(dipole_network("dipole"), dipole_op)
    with pytest.raises(AssertionError, match=REFUSED[dipole_op]):
        build_plan(model, errors)


def test_every_network_is_here() -> None:
    assert {case.split()[0] for case in SMALL} == set(REGISTRY)


def test_an_operator_that_it_lacks_is_refused(errors) -> None:
    with pytest.raises(AssertionError, match="DFT"):
        build_plan(onnx.parser.parse_model(DFT), errors)
