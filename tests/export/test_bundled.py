"""The weights and the model that come with the package belong together, and are alive."""

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qsm_deploy.runtime.card.card as card_module
from qsm_deploy.export.checkpoints.state import load_state, state_sha256
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.measure.verification import apply_gate, measure_differences, phantom_scan
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.network_spec import WEIGHTS_FOLDER
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.runtime.card.card import METADATA_KEY, parse_card
from qsm_deploy.runtime.reconstruction.pipeline import network_inputs
from qsm_deploy.runtime.sessions.open import open_session

TV_UNET = REGISTRY["tv-unet"]
TV_UNET_ONNX = Path(card_module.__file__).parents[1] / "models" / "tv-unet.onnx"
SMALLEST_ACTIVE_SHARE = 0.01


def test_every_bundled_file_is_half_precision_and_loads() -> None:
    specs = {spec.bundled[0]: spec for spec in REGISTRY.values() if spec.bundled}
    files = sorted(WEIGHTS_FOLDER.glob("*.safetensors"))
    assert TV_UNET.bundled_file() in files
    for file in files:
        kinds = {t.dtype for t in load_file(file).values() if t.is_floating_point()}
        assert kinds == {torch.float16}
        spec = specs[file.name]
        build_network(spec, load_state(file), Choices(spec.chosen_options({})))


def test_every_level_of_tv_unet_is_alive() -> None:
    network = build_network(TV_UNET, load_state(TV_UNET.bundled_file()), Choices())
    shares: list[float] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shares.append(float((output > 0).float().mean()))

    for module in network.modules():
        if isinstance(module, nn.LeakyReLU):
            module.register_forward_hook(note)
    card = provisional_card(TV_UNET, network, Choices(), "none", "0" * 64)
    inputs = network_inputs(card, phantom_scan(card, (64, 64, 64))).values()
    with torch.inference_mode():
        network(*(torch.from_numpy(v[None] if v.ndim == 4 else v) for v in inputs))
    assert len(shares) == 11
    assert min(shares) > SMALLEST_ACTIVE_SHARE


@pytest.mark.slow
def test_exporting_the_bundled_weights_again_gives_the_bundled_model() -> None:
    state = load_state(TV_UNET.bundled_file())
    bundled = onnx.load(TV_UNET_ONNX)
    again = onnx_from_module(build_network(TV_UNET, state, Choices()))
    # what the exporter of another PyTorch may name or version otherwise is not compared
    assert [_essence(n) for n in again.graph.node] == [_essence(n) for n in bundled.graph.node]
    assert _weights(again) == _weights(bundled)

    (stored,) = [p.value for p in bundled.metadata_props if p.key == METADATA_KEY]
    card = parse_card(stored)
    assert card.weights_sha256 == state_sha256(state)
    assert 0 < card.verified.max_ppb <= 0.01
    assert card.memory.keys() == {"onnxruntime", "openvino"}
    assert 0 < card.receptive_field.halo <= card.receptive_field.theoretical


def _essence(node: onnx.NodeProto) -> tuple[str, dict[str, object]]:
    return node.op_type, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _weights(model: onnx.ModelProto) -> list[tuple[list[int], bytes]]:
    """Return shapes and values in an order that names do not decide."""
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return sorted((list(a.shape), a.tobytes()) for a in arrays)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_bundled_model_computes_what_its_weights_say(backend) -> None:
    network = build_network(TV_UNET, load_state(TV_UNET.bundled_file()), Choices())
    card = open_session(TV_UNET_ONNX, backend).card
    apply_gate(measure_differences(TV_UNET_ONNX, network, card, (backend,)), 0.01)
