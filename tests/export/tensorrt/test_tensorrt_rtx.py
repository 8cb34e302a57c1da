"""Every network becomes a TensorRT-RTX plan, in FP32, FP16 and INT8, for many batches and sizes.

Building needs no GPU, even loading a plan does. So these tests say that TensorRT-RTX knows every
operator as the export uses it, and not that it computes the right thing.
"""

from dataclasses import replace

import onnx
import onnx.parser
import pytest

from qsm_deploy.calibration.int8.layers import int8_layers
from qsm_deploy.calibration.int8.qdq import Quantiser
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.gpu.building.builder import build_plan
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import plan_target
from qsm_deploy.runtime.gpu.building.profile import profile_from
from tests.export.table import SMALL

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


# the others are of the same operators
QUICK = ("tv-unet",)
# what it says of the dipole operator in the forms that it lacks
REFUSED = {"function": "value_string", "plugin": "Plugin not found"}
DFT = """<ir_version: 10, opset_import: ["": 20]>
g (float[1, x, 1] local_field_ppm) => (float[1, x, 2] y) { y = DFT(local_field_ppm) }"""


def plan_of(model: onnx.ModelProto, network: Network) -> bytes:
    """Return a plan for many shapes, or fail with what TensorRT-RTX says of the graph."""
    card = provisional_card(REGISTRY["ir2qsm"], network, Choices(), "none", "0" * 64)
    profile = profile_from("16,64,256", network.divisor, patchable=True)
    choices = PlanChoices("tensorrt-rtx")
    card = replace(card, options=plan_target(choices).options())
    plan = build_plan(model.SerializeToString(), card, profile, choices)
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


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in SMALL]
)
def test_it_builds(case: str, small, traced) -> None:
    network, model = small(case), traced(case)
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


def test_it_has_no_transposed_convolution_in_bf16(tiny_tv_unet) -> None:
    model = with_precision(onnx_from_module(tiny_tv_unet), "bf16")
    with pytest.raises(ExportError, match="tensorrt-rtx cannot build this network"):
        plan_of(model, tiny_tv_unet)


def test_every_network_is_here() -> None:
    assert {case.split()[0] for case in SMALL} == set(REGISTRY)


def test_an_operator_that_it_lacks_is_refused(tiny_ir2qsm) -> None:
    with pytest.raises(ExportError, match="DFT"):
        plan_of(onnx.parser.parse_model(DFT), tiny_ir2qsm)
