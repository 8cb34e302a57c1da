"""BFRnet's weights from what MATLAB exports as ONNX: by the names of the layers, or not at all."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from qsm_deploy.export.checkpoints.matlab_onnx import WEIGHTS, load_matlab_onnx
from qsm_deploy.export.cli import main
from qsm_deploy.export.networks.bfrnet import BFRnet, authors_layers, network_from_state
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.kernels.errors import WeightsError

BASE, DEPTH = 2, 1


def operator(weight: Tensor) -> str:
    if weight.ndim == 1:
        return "BatchNormalization"
    return "ConvTranspose" if weight.shape[-1] in (2, 4) else "Conv"


@pytest.fixture
def source(formula_state) -> BFRnet:
    network = BFRnet(BASE, DEPTH)
    network.load_state_dict(formula_state(network.state_dict()))
    return network.eval()


@pytest.fixture
def model(source: BFRnet) -> onnx.ModelProto:
    """Return the layers one after the other: the loader asks for nothing but their weights."""
    state, nodes, values = source.state_dict(), [], []
    for ours, theirs in authors_layers(DEPTH):
        if f"{ours}.weight" not in state:
            continue
        kind, name = operator(state[f"{ours}.weight"]), theirs.replace("-", "_")
        given = [f"{name}_{what}" for what in WEIGHTS[kind]]
        values += [
            numpy_helper.from_array(state[f"{ours}.{what}"].numpy(), g)
            for what, g in zip(WEIGHTS[kind], given, strict=True)
        ]
        nodes.append(helper.make_node(kind, ["x", *given], [f"{name}_y"], name))
    nodes.append(helper.make_node("Add", ["Final_ConvolutionLayer_y", "x"], ["y"], "add"))
    x, y = (helper.make_tensor_value_info(n, 1, [1, 1, *("a" + n, "b" + n, "c" + n)]) for n in "xy")
    return helper.make_model(helper.make_graph(nodes, "net", [x], [y], values))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    def written(model: onnx.ModelProto) -> Path:
        onnx.save(model, tmp_path / "BFRnet.onnx")
        return tmp_path / "BFRnet.onnx"

    return written


def test_its_weights_are_those_of_the_network(model, source, write) -> None:
    network = network_from_state(load_matlab_onnx(write(model)), Choices())
    field = torch.randn(1, 1, 8, 4, 12, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network(field), source(field))


def test_a_layer_of_another_name_is_refused(model, write) -> None:
    next(node for node in model.graph.node if node.name == "Output_Conv_LH").name = "Conv_17"
    with pytest.raises(WeightsError, match=r"Output-Conv-LH\.weight \(here last\.convLH"):
        network_from_state(load_matlab_onnx(write(model)), Choices())


def test_names_that_are_the_same_but_for_signs_are_refused(model, write) -> None:
    state = load_matlab_onnx(write(model))
    state["Output-Conv-LH.weight"] = state["Output_Conv_LH.weight"]
    with pytest.raises(WeightsError, match="is the name of two layers"):
        network_from_state(state, Choices())


def rename_twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].name = model.graph.node[0].name


def forget_values(model: onnx.ModelProto) -> None:
    del model.graph.initializer[3:]


def subtract_the_mean(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Sub", ["x", "mean"], ["x2"], "zero"))


def another_epsilon(model: onnx.ModelProto) -> None:
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    norm.attribute.append(helper.make_attribute("epsilon", 1e-3))


def without_the_residual(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]
    model.graph.output[0].name = "Final_ConvolutionLayer_y"


def add_something_else(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[1] = "Output_Conv_LH_y"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (rename_twice, "two layers of this name"),
        (forget_values, "its values are not in there"),
        (subtract_the_mean, "Sub in it, which the network has not"),
        (another_epsilon, "has another epsilon than 1e-05"),
        (without_the_residual, "does not end with the addition of its input"),
        (add_something_else, "does not end with the addition of its input"),
    ],
)
def test_another_graph_is_refused_in_one_line(spoil, words: str, model, write) -> None:
    spoil(model)
    with pytest.raises(WeightsError, match=words) as caught:
        load_matlab_onnx(write(model))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path, model) -> None:
    data = model.SerializeToString()
    for share in (0.3, 0.7, 0.99):
        (tmp_path / "cut.onnx").write_bytes(data[: int(share * len(data))])
        with pytest.raises(WeightsError, match=r"cut\.onnx"):
            load_matlab_onnx(tmp_path / "cut.onnx")


def test_the_authors_object_is_refused_with_the_way_out(tmp_path, capsys) -> None:
    path = tmp_path / "BFRnet_L2.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    assert main(["--model", "bfrnet", "--weights", str(path), "-q"]) == 7
    assert "exportONNXNetwork(net,'BFRnet.onnx','OpsetVersion',13)" in capsys.readouterr().err


def test_only_bfrnet_takes_it(model, write, capsys) -> None:
    path = write(model)
    assert main(["--model", "xqsm", "--weights", str(path), "-q"]) == 7
    assert "an exported model, no weights" in capsys.readouterr().err
