"""The graph: what is in it, what is not, and that it runs at every size that the divisor allows."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qsm_deploy.export.graph import onnx_export, tracing
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.network import Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.kernels.errors import ExportError

IR2QSM_INPUTS = ("local_field_ppm",)
NUMBER = "field_noise_ppm"
TV_UNET_INPUTS = REGISTRY["tv-unet"].inputs


@pytest.fixture(scope="module", autouse=True)
def really_traced(kept: None) -> Iterator[None]:
    """Trace in truth: that is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "trace", tracing.trace)
        yield


@pytest.fixture(scope="module")
def ir2qsm(tiny_ir2qsm) -> onnx.ModelProto:
    return onnx_from_module(tiny_ir2qsm)


@pytest.fixture(scope="module")
def tv_unet(tiny_tv_unet) -> onnx.ModelProto:
    return onnx_from_module(tiny_tv_unet)


def test_batch_norm_is_folded_and_nothing_is_random(ir2qsm, tv_unet) -> None:
    for model in (ir2qsm, tv_unet):
        kinds = {node.op_type for node in model.graph.node}
        assert not {k for k in kinds if "Norm" in k or "Random" in k or "Dropout" in k}
    assert Counter(n.op_type for n in tv_unet.graph.node)["LeakyRelu"] == 11


def test_inputs_and_output_have_names_types_and_free_axes(ir2qsm, tv_unet) -> None:
    for model, names in ((ir2qsm, IR2QSM_INPUTS), (tv_unet, TV_UNET_INPUTS)):
        graph = model.graph
        assert [i.name for i in graph.input] == list(names)
        assert [o.name for o in graph.output] == ["chi_ppm"]
        for value in (*graph.input, *graph.output):
            tensor = value.type.tensor_type
            assert tensor.elem_type == onnx.TensorProto.FLOAT
            axes = [d.dim_param or d.dim_value for d in tensor.shape.dim]
            assert axes == ([1] if value.name == NUMBER else ["n", 1, "4*x", "4*y", "4*z"])


def test_weights_are_inside_and_the_checker_agrees(ir2qsm) -> None:
    onnx.checker.check_model(ir2qsm, full_check=True)
    assert all(not t.external_data for t in ir2qsm.graph.initializer)


def test_nothing_tells_of_the_exporting_machine(ir2qsm, tv_unet) -> None:
    for model in (ir2qsm, tv_unet):
        data = model.SerializeToString()
        assert b".py" not in data
        assert b"stack_trace" not in data


def test_the_same_weights_give_the_same_bytes(tiny_tv_unet, tv_unet) -> None:
    again = onnx_from_module(tiny_tv_unet)
    assert again.SerializeToString(deterministic=True) == tv_unet.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("shape", [(1, 8, 4, 12), (2, 4, 8, 20), (3, 16, 16, 16)])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_any_batch_and_size(
    run, ir2qsm, tv_unet, tiny_ir2qsm, tiny_tv_unet, shape, backend
) -> None:
    n, *size = shape
    rng = np.random.default_rng(0)
    for model, module in ((ir2qsm, tiny_ir2qsm), (tv_unet, tiny_tv_unet)):
        shapes = [(1,) if value.name == NUMBER else (n, 1, *size) for value in model.graph.input]
        inputs = [np.float32(0.02) * rng.standard_normal(s, dtype=np.float32) for s in shapes]
        got = run(model, *inputs, backend=backend)
        expected = run(module, *inputs)
        assert got.shape == (n, 1, *size)
        assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


def test_the_exporter_is_quiet(tiny_tv_unet, capfd) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        onnx_from_module(tiny_tv_unet)
    out, err = capfd.readouterr()
    assert (out, err, [str(w.message) for w in caught]) == ("", "", [])
    assert not logging.getLogger("torch.onnx._internal.exporter._registration").filters


class Noisy(Network):
    divisor = 1

    def forward(self, local_field_ppm: torch.Tensor) -> torch.Tensor:
        return local_field_ppm + torch.randn_like(local_field_ppm)


class Branching(Network):
    divisor = 1

    def forward(self, local_field_ppm: torch.Tensor) -> torch.Tensor:
        return local_field_ppm if float(local_field_ppm.sum()) > 0 else -local_field_ppm


class Training(Network):
    divisor = 1

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(1)

    def forward(self, local_field_ppm: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(local_field_ppm)
        return y


@pytest.mark.parametrize("network", [Noisy().eval(), Branching().eval()])
def test_noise_and_branches_on_data_are_refused(network: Network) -> None:
    with pytest.raises(ExportError, match=type(network).__name__):
        onnx_from_module(network)


def test_a_module_in_training_mode_is_refused() -> None:
    with pytest.raises(ExportError, match=r"Training.*\.eval\(\)"):
        onnx_from_module(Training().train())
